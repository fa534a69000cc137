"""Sphinx configuration for the documentation of this package alone.

It is plain Sphinx, so that it builds wherever the package installs; pipelines.lsst.io has its own.
"""

import sys
from pathlib import Path

from lsst.coadd.deepprior import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "coadd_deepprior"
copyright = "2026, the coadd_deepprior developers"
release = __version__
extensions = ["sphinx.ext.autodoc", "numpydoc", "generated_reference"]
exclude_patterns = ["_build"]
default_role = "py:obj"

autodoc_default_options = {"members": True}
autodoc_typehints = "none"
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False

html_theme = "alabaster"
html_theme_options = {"page_width": "75em", "sidebar_width": "16em"}
html_title = project
