# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Coadds as afw exposures with all their components, for a full Science Pipelines installation."""

from __future__ import annotations

__all__ = ("to_exposure",)

from typing import Any

import numpy as np

from lsst.images.cells import CellCoadd, CellField

from .stack_imports import import_from_stack

_FIT_ORDER = 2
"""Order of the polynomials that stand for aperture corrections, which afw has no cells for."""


def to_exposure(coadd: CellCoadd) -> Any:
    """Return a coadd as an exposure that has its inputs and aperture corrections.

    ``butler.get(..., storageClass="ExposureF")`` returns an exposure without these two, since afw cannot hold
    them cell by cell; with ``config/butler`` of this package in ``DAF_BUTLER_CONFIG_PATH`` the Butler calls
    this function instead.

    Parameters
    ----------
    coadd : `lsst.images.cells.CellCoadd`
        Coadd of a whole patch in nJy.

    Returns
    -------
    exposure : `lsst.afw.image.ExposureF`
        Image, mask, variance, PSF, WCS, photometric calibration and filter of the coadd; its inputs with the
        outlines of the detectors in the pixels of the coadd, as ``lsst.cell_coadds`` makes them; and aperture
        corrections as polynomials of second order, fitted to the values at the centres of the cells.

    Raises
    ------
    ImportError
        Raised without a Science Pipelines installation.
    """
    afw_image = import_from_stack("lsst.afw.image")
    import_from_stack("lsst.cell_coadds")
    exposure = coadd.to_legacy_cell_coadd().stitch().asExposure()
    corrections = afw_image.ApCorrMap()
    for name, field in coadd.aperture_corrections.items():
        if (fitted := _fit(field, exposure.getBBox())) is not None:
            corrections[name] = fitted
    exposure.info.setApCorrMap(corrections)
    return exposure


def _fit(field: CellField, bbox: Any) -> Any:
    """Fit a polynomial to a field of cells, `None` if no cell has a value."""
    math = import_from_stack("lsst.afw.math")
    cells = list(field.bounds.cell_indices())
    if not cells:
        return None
    boxes = [field.bounds.grid.bbox_of(cell) for cell in cells]
    control = math.ChebyshevBoundedFieldControl()
    # A polynomial of order n needs n + 1 rows and columns of cells.
    control.orderX = min(_FIT_ORDER, len({cell.j for cell in cells}) - 1)
    control.orderY = min(_FIT_ORDER, len({cell.i for cell in cells}) - 1)
    return math.ChebyshevBoundedField.fit(
        bbox,
        np.array([box.x.center for box in boxes], dtype=float),
        np.array([box.y.center for box in boxes], dtype=float),
        np.array([field.value_in_cell(cell) for cell in cells], dtype=float),
        control,
    )
