# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Directories that the configuration names for the node on which a job runs."""

from __future__ import annotations

__all__ = ("job_directory",)

import os
from pathlib import Path


def job_directory(field: str, directory: str) -> Path:
    """Replace the environment variables and the ``~`` of a directory.

    Parameters
    ----------
    field : `str`
        The config field that names it.
    directory : `str`
        Its value.

    Returns
    -------
    path : `~pathlib.Path`
        The directory.

    Raises
    ------
    RuntimeError
        Raised if an environment variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(directory))
    if "$" in expanded:
        raise RuntimeError(
            f"{field} = {directory!r} has an environment variable that is not set here; set it in the job."
        )
    return Path(expanded)
