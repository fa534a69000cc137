# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The parts of a patch that a network is fitted on.

What a network learns from a patch is how noise and sources look there, not where they are. So the fit need
not see all of a large patch, and time and memory of the fit need not grow with it: it is cut into quarters,
and the fit sees a window in each.
"""

from __future__ import annotations

__all__ = ("WINDOW", "cut_out", "fit_windows")

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from .observation import Observation
from .operators import CellLayout
from .patch_data import PatchData

WINDOW = 512
"""Side of a window in pixels of the visits, up to whole cells but not beyond half of the patch; patches are
fitted whole up to twice of it. ``benchmarks/windows.py`` compares it with half of it and with the whole."""


def fit_windows(data: PatchData, seed: int) -> list[PatchData]:
    """Return the parts of a patch that a network is to be fitted on.

    Each is where most visits are in its quarter of the patch, and at random where many places have as many.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The patch; its visits are read once if there is more than one part.
    seed : `int`
        Seed of the places.

    Returns
    -------
    parts : `list` [`~lsst.coadd.deepprior.patch_data.PatchData`]
        Patches with two groups of visits at least, whose pixels stay in memory; or the patch itself, if it is
        small or has no such part.
    """
    layout = data.layout
    quarters = itertools.product(
        _halves(layout.n_i, layout.height, data.sampling), _halves(layout.n_j, layout.width, data.sampling)
    )
    n_visits = (data.weight > 0.0).sum(axis=0)
    rng = np.random.default_rng(seed)
    blocks = [_fullest(n_visits, rows, columns, rng) for rows, columns in quarters]
    if len(blocks) == 1:
        return [data]
    return [part for part in cut_out(data, blocks) if part.n_groups > 1] or [data]


def _halves(n_cells: int, size: int, sampling: int) -> list[tuple[range, int]]:
    """Return where the first cell of a window may be along an axis, and its number of cells."""
    size //= sampling
    if n_cells * size <= 2 * WINDOW or n_cells == 1:
        return [(range(1), n_cells)]
    middle = n_cells // 2
    number = min(-(-WINDOW // size), middle)
    return [(range(middle - number + 1), number), (range(middle, n_cells - number + 1), number)]


def _fullest(
    n_visits: np.ndarray,
    rows: tuple[range, int],
    columns: tuple[range, int],
    rng: np.random.Generator,
) -> tuple[slice, slice]:
    """Return the block of cells that most visits see, one of them at random."""
    places = [
        (slice(i, i + rows[1]), slice(j, j + columns[1])) for i, j in itertools.product(rows[0], columns[0])
    ]
    seen = np.array([n_visits[place].sum() for place in places])
    return places[int(rng.choice(np.flatnonzero(seen == seen.max())))]


def cut_out(data: PatchData, blocks: Sequence[tuple[slice, slice]]) -> list[PatchData]:
    """Read the visits of a patch once, and make patches of their own of blocks of its cells.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The patch.
    blocks : `~collections.abc.Sequence` [`tuple` [`slice`, `slice`]]
        Rows and columns of the cells of each.

    Returns
    -------
    parts : `list` [`~lsst.coadd.deepprior.patch_data.PatchData`]
        Those of the blocks that have a good pixel; the visits in them stay in memory.
    """
    inside: list[list[Observation]] = [[] for _ in blocks]
    for index in np.flatnonzero(data.weight.any(axis=(1, 2))).tolist():
        observation = data.observations[index]
        for block, visits in zip(blocks, inside, strict=True):
            if data.weight[index][block].any():
                visits.append(_cut(observation, data.layout, *block))
    layouts = [
        dataclasses.replace(data.layout, n_i=rows.stop - rows.start, n_j=columns.stop - columns.start)
        for rows, columns in blocks
    ]
    return [data.anew(visits, layout) for visits, layout in zip(inside, layouts, strict=True) if visits]


def _cut(observation: Observation, layout: CellLayout, rows: slice, columns: slice) -> Observation:
    """Return what a visit has in some rows and columns of cells, without its image of noise."""
    ys = slice(rows.start * layout.height, rows.stop * layout.height)
    xs = slice(columns.start * layout.width, columns.stop * layout.width)
    (y0, x0), (ny, nx) = observation.origin, observation.flux.shape
    y, x = max(y0, ys.start), max(x0, xs.start)
    here = slice(y - y0, min(y0 + ny, ys.stop) - y0), slice(x - x0, min(x0 + nx, xs.stop) - x0)
    return dataclasses.replace(
        observation,
        flux=observation.flux[here].copy(),
        variance=observation.variance[here].copy(),
        good=observation.good[here].copy(),
        psf=observation.psf[rows, columns].copy(),
        origin=(y - ys.start, x - xs.start),
        noise=None,
    )
