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

__all__ = ("WINDOW", "fit_windows")

import itertools

import numpy as np

from .patch_data import PatchData

WINDOW = 512
"""Least side of a window in pixels; patches are fitted whole up to twice of it. On two scenes that the
benchmark does not report, windows of half the side cost 0.4 dB of PSNR, against these on 1050x1200 pixels and
against the whole on 600x600, in two fifths and less than a third of the time."""


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
    return [part for part in data.parts(blocks) if part.n_groups > 1] or [data]


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
