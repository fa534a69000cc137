# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The cells of a patch, in which PSFs are constant."""

from __future__ import annotations

__all__ = (
    "cover_with_cells",
    "cut_into_cells",
    "fill_cells",
    "make_cell_field",
    "make_cell_psf",
    "spread_cell_field",
)

import math

import numpy as np

from lsst.images import YX, Box
from lsst.images.cells import CellField, CellGrid, CellGridBounds, CellIJ, CellPointSpreadFunction


def cover_with_cells(bbox: Box, cell_shape: YX[int]) -> CellGrid:
    """Lay a grid of cells over a box, from its lower left corner.

    Parameters
    ----------
    bbox : `lsst.images.Box`
        Box in tract pixels.
    cell_shape : `lsst.images.YX` [`int`]
        Height and width of a cell in pixels.

    Returns
    -------
    grid : `lsst.images.cells.CellGrid`
        Grid whose box is ``bbox``, enlarged at its upper and right border to a whole number of cells.
    """
    shape = YX(
        y=math.ceil(bbox.y.size / cell_shape.y) * cell_shape.y,
        x=math.ceil(bbox.x.size / cell_shape.x) * cell_shape.x,
    )
    return CellGrid(bbox=Box.from_shape(shape, start=bbox.start), cell_shape=cell_shape)


def cut_into_cells(bbox: Box, most: int) -> CellGrid:
    """Cut a box into cells of equal shape that do not reach beyond it, if that can be.

    Parameters
    ----------
    bbox : `lsst.images.Box`
        Box in tract pixels.
    most : `int`
        Largest height and width of a cell in pixels.

    Returns
    -------
    grid : `lsst.images.cells.CellGrid`
        Cells of the largest height and width from half of ``most`` up to it that divide those of the box.
        Where none does, cells are ``most`` pixels long and reach beyond the upper or right border.
    """

    def size(extent: int) -> int:
        return next((n for n in range(most, (most - 1) // 2, -1) if extent % n == 0), most)

    return cover_with_cells(bbox, YX(y=size(bbox.y.size), x=size(bbox.x.size)))


def fill_cells(values: np.ndarray, grid: CellGrid) -> np.ndarray:
    """Give all pixels of a cell the value of the cell.

    Parameters
    ----------
    values : `numpy.ndarray`, (cell_i, cell_j)
        One value for each cell.
    grid : `lsst.images.cells.CellGrid`
        The cells.

    Returns
    -------
    pixels : `numpy.ndarray`, (y, x)
        Values of the pixels.
    """
    return np.repeat(np.repeat(values, grid.cell_shape.y, axis=0), grid.cell_shape.x, axis=1)


def make_cell_psf(stamps: np.ndarray, grid: CellGrid) -> CellPointSpreadFunction:
    """Make the PSF of a patch from its stamps.

    Parameters
    ----------
    stamps : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF stamps; cells in which all pixels are NaN are missing.
    grid : `lsst.images.cells.CellGrid`
        Cells of the patch.

    Returns
    -------
    psf : `lsst.images.cells.CellPointSpreadFunction`
        The PSF.
    """
    missing = np.argwhere(np.isnan(stamps).all(axis=(2, 3))).tolist()
    bounds = CellGridBounds(
        grid=grid, bbox=grid.bbox, missing=frozenset(CellIJ(i=i, j=j) for i, j in missing)
    )
    return CellPointSpreadFunction(stamps, bounds=bounds)


def make_cell_field(values: np.ndarray, bounds: CellGridBounds) -> CellField:
    """Make the field of a number that each cell of a patch has.

    Parameters
    ----------
    values : `numpy.ndarray`, (cell_i, cell_j)
        Values in all cells of the patch; those that are NaN are missing.
    bounds : `lsst.images.cells.CellGridBounds`
        Cells that the field is to reach.

    Returns
    -------
    field : `lsst.images.cells.CellField`
        The field.
    """
    start, stop = bounds.subgrid_start, bounds.subgrid_stop
    values = np.array(values[start.i : stop.i, start.j : stop.j], dtype=np.float64)
    for cell in bounds.missing:
        values[cell.i - start.i, cell.j - start.j] = np.nan
    unknown = {CellIJ(i=i + start.i, j=j + start.j) for i, j in np.argwhere(np.isnan(values)).tolist()}
    return CellField(bounds.model_copy(update={"missing": bounds.missing | unknown}), values)


def spread_cell_field(field: CellField) -> np.ndarray:
    """Return the values of a field in all cells of its patch.

    Parameters
    ----------
    field : `lsst.images.cells.CellField`
        The field.

    Returns
    -------
    values : `numpy.ndarray`, (cell_i, cell_j)
        Its values, NaN in cells that it does not have.
    """
    values = np.full(field.bounds.grid.grid_size.as_tuple(), np.nan)
    for cell in field.bounds.cell_indices():
        values[cell.i, cell.j] = field.value_in_cell(cell)
    return values
