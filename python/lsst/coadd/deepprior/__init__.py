# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Restored coadds of Rubin warps, with a neural prior that learns to predict visits from other visits.

The modules are imported one by one (``lsst.coadd.deepprior.warps`` ...); this one stays light, since graph
building imports it.
"""

from __future__ import annotations

__all__ = ["__version__"]

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lsst-coadd-deepprior")
except PackageNotFoundError:  # set up by EUPS or PYTHONPATH: there is no installed distribution to ask
    __version__ = "0.0.0+unknown"
