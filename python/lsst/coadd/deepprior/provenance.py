# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Tables of which visit and detector went into which cell."""

from __future__ import annotations

__all__ = ("make_provenance",)

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsst.images import Box, NoOverlapError, Polygon
from lsst.images.cells import CellGridBounds, CoaddProvenance, PatchDefinition

if TYPE_CHECKING:
    from .warps import WarpInfo


def make_provenance(
    warps: Sequence[WarpInfo],
    patch: PatchDefinition,
    *,
    contributes: np.ndarray,
    weight: np.ndarray,
    overlap_fraction: np.ndarray,
    unmasked_fraction: np.ndarray,
) -> CoaddProvenance:
    """Make the tables of which visit went into which cell.

    Parameters
    ----------
    warps : `~collections.abc.Sequence` [`WarpInfo`]
        The visits; the detectors of those that contribute to some cell have an input row each.
    patch : `lsst.images.PatchDefinition`
        Definition of the patch.
    contributes : `numpy.ndarray`, (visit, cell_i, cell_j), bool
        Whether the visit contributes to the cell; if so, there is a contribution row for each of its
        detectors that reaches the cell.
    weight : `numpy.ndarray`, (visit, cell_i, cell_j)
        Weight of the visit in the cell.
    overlap_fraction : `numpy.ndarray`, (visit, cell_i, cell_j)
        Fraction of the cell's pixels that the visit's box covers, which its detectors share.
    unmasked_fraction : `numpy.ndarray`, (visit, cell_i, cell_j)
        Fraction of the cell's pixels in which the visit was used, which its detectors share in the same way.

    Returns
    -------
    provenance : `lsst.images.cells.CoaddProvenance`
        The tables.
    """
    used = [warps[t] for t in np.flatnonzero(contributes.any(axis=(1, 2))).tolist()] or list(warps)
    input_rows = [(warp, detector) for warp in used for detector in warp.detectors]
    inputs = CoaddProvenance.make_empty_input_table(len(input_rows))
    for name in ("instrument", "visit", "physical_filter", "day_obs"):
        inputs[name][:] = [getattr(warp, name) for warp, _ in input_rows]
    inputs["detector"][:] = [detector for _, detector in input_rows]
    for row, (warp, detector) in zip(inputs, input_rows, strict=True):
        row["polygon"] = warp.detectors[detector]

    boxes = {
        (cell.i, cell.j): patch.cells.bbox_of(cell)
        for cell in CellGridBounds(grid=patch.cells, bbox=patch.cells.bbox).cell_indices()
    }
    entries = [
        (t, i, j, detector, share)
        for t, i, j in np.argwhere(contributes).tolist()
        for detector, share in _shares(warps[t].detectors, boxes[i, j]).items()
    ]
    rows = CoaddProvenance.make_empty_contribution_table(len(entries))
    columns = np.array(entries, dtype=float).reshape(-1, 5).T
    visits, cell_i, cell_j, detectors = columns[:4].astype(int)
    shares = columns[4]
    rows["cell_i"][:], rows["cell_j"][:], rows["detector"][:] = cell_i, cell_j, detectors
    for name in ("instrument", "visit"):
        rows[name][:] = [getattr(warps[t], name) for t in visits]
    rows["overlaps_center"][:] = [
        _overlaps_center(warps[t], detector, boxes[i, j]) for t, i, j, detector, _ in entries
    ]
    rows["overlap_fraction"][:] = shares * overlap_fraction[visits, cell_i, cell_j]
    rows["unmasked_fraction"][:] = shares * unmasked_fraction[visits, cell_i, cell_j]
    rows["weight"][:] = weight[visits, cell_i, cell_j]
    shapes = [warps[t].psf_shapes[i, j] for t, i, j, _, _ in entries]
    xx, yy, xy = np.array(shapes).reshape(-1, 3).T
    rows["psf_shape_xx"][:], rows["psf_shape_yy"][:], rows["psf_shape_xy"][:] = xx, yy, xy
    rows["psf_shape_flag"][:] = ~np.isfinite(xx + yy + xy)
    return CoaddProvenance(inputs=inputs, contributions=rows)


def _overlaps_center(warp: WarpInfo, detector: int, cell: Box) -> bool:
    """Tell whether a detector covers the central pixel of a cell."""
    y, x = cell.y.start + cell.y.size // 2, cell.x.start + cell.x.size // 2
    return warp.bbox.contains(y=y, x=x) and bool(warp.detectors[detector].contains(y=y, x=x))


def _shares(detectors: Mapping[int, Polygon], cell: Box) -> dict[int, float]:
    """Return the shares, of sum 1, of the detectors in the area of a cell that the visit covers."""
    if len(detectors) == 1:
        return dict.fromkeys(detectors, 1.0)
    outline = Polygon.from_box(cell)
    areas = {}
    for detector, polygon in detectors.items():
        with contextlib.suppress(NoOverlapError):
            areas[detector] = polygon.intersection(outline).area
    areas = {detector: area for detector, area in areas.items() if area > 0.0}
    if not areas:  # outlines are straight lines between corners, pixels are not
        return {next(iter(detectors)): 1.0}
    total = sum(areas.values())
    return {detector: area / total for detector, area in areas.items()}
