# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Tables of which visit and detector went into which cell."""

from __future__ import annotations

__all__ = ("make_provenance",)

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsst.images import Box, Polygon
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
        The visits; the detectors of those that contribute to some cell, or of all if none does, have an input
        row each.
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

    cells = list(CellGridBounds(grid=patch.cells, bbox=patch.cells.bbox).cell_indices())
    boxes = [patch.cells.bbox_of(cell) for cell in cells]
    shape = patch.cells.grid_size.as_tuple()
    center_x = np.array([box.x.start + box.x.size // 2 for box in boxes]).reshape(shape)
    center_y = np.array([box.y.start + box.y.size // 2 for box in boxes]).reshape(shape)
    columns: dict[str, list[np.ndarray]] = {}
    for t, warp in enumerate(warps):
        covered = warp.bbox.contains(x=center_x, y=center_y)
        for detector, share in _shares(warp.detectors, boxes, shape).items():
            here = contributes[t] & (share > 0.0)
            i, j = np.nonzero(here)
            xx, yy, xy = warp.psf_shapes[here].T
            block = {
                "cell_i": i,
                "cell_j": j,
                "instrument": np.full(len(i), warp.instrument, dtype=object),
                "visit": np.full(len(i), warp.visit),
                "detector": np.full(len(i), detector),
                "overlaps_center": (covered & warp.detectors[detector].contains(x=center_x, y=center_y))[
                    here
                ],
                "overlap_fraction": (share * overlap_fraction[t])[here],
                "unmasked_fraction": (share * unmasked_fraction[t])[here],
                "weight": weight[t][here],
                "psf_shape_xx": xx,
                "psf_shape_yy": yy,
                "psf_shape_xy": xy,
                "psf_shape_flag": ~np.isfinite(xx + yy + xy),
            }
            for name, values in block.items():
                columns.setdefault(name, []).append(values)
    rows = CoaddProvenance.make_empty_contribution_table(sum(map(len, columns["visit"])))
    for name, blocks in columns.items():
        rows[name][:] = np.concatenate(blocks)
    return CoaddProvenance(inputs=inputs, contributions=rows)


def _shares(
    detectors: Mapping[int, Polygon], cells: Sequence[Box], shape: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Return the shares, of sum 1, of the detectors in what they cover of each cell, (cell_i, cell_j).

    The first one has all of a cell that none covers: outlines are straight between corners, pixels are not.
    """
    if len(detectors) == 1:
        return dict.fromkeys(detectors, np.ones(shape))
    outlines = [Polygon.from_box(cell).to_shapely() for cell in cells]
    areas = {}
    for detector, polygon in detectors.items():
        region = polygon.to_shapely()
        areas[detector] = np.array([region.intersection(cell).area for cell in outlines]).reshape(shape)
    total = np.sum(list(areas.values()), axis=0)
    first = next(iter(areas))
    areas[first] = np.where(total > 0.0, areas[first], 1.0)
    return {detector: area / np.where(total > 0.0, total, 1.0) for detector, area in areas.items()}
