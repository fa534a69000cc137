# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Imports of packages that only a full Science Pipelines installation has."""

from __future__ import annotations

__all__ = ("import_from_stack",)

import importlib
from typing import Any


def import_from_stack(module: str) -> Any:
    """Import a module of the Science Pipelines that is not on PyPI.

    Parameters
    ----------
    module : `str`
        Full name of the module, such as ``lsst.afw.geom``.

    Returns
    -------
    module : `types.ModuleType`
        The module.

    Raises
    ------
    ImportError
        Raised if it cannot be imported; the message names the EUPS product and says what to set up.
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        # Products are named by two parts, lsst.afw and lsst.geom by one; their parts have no product.
        parts = module.split(".")[1:]
        product = parts[0] if parts[0] in ("afw", "geom", "skymap") else "_".join(parts[:2])
        raise ImportError(
            f"{module} cannot be imported ({err}). It comes with the product {product} of the LSST Science "
            "Pipelines, which are not on PyPI: run 'setup lsst_distrib' before, or use warps of the form "
            "'cell_coadd', which need no such installation."
        ) from err
