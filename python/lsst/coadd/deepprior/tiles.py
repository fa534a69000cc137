# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Tiles that cover a canvas, each of which is convolved by itself."""

from __future__ import annotations

__all__ = ("CellTiles", "EqualTiles", "Tiles")

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.ndimage
import torch

from .parallel import in_parallel

if TYPE_CHECKING:
    from .operators import CellLayout

_FFT_LENGTH = 512
"""About the length of the FFT where it can be chosen."""


def _ramp_windows(n: int, size: int, margin: int) -> torch.Tensor:
    """Partition of unity along one axis.

    Returns an array (n, size + 2 margin): row i is the weight of cell i on its own pixels and ``margin``
    pixels to both sides; raised cosines cross over at every inner border, and the first and last cell keep
    the outer margin.
    """
    half = min(margin, size // 2)
    length = size + 2 * margin
    position = torch.arange(length, dtype=torch.float64) + 0.5 - margin
    windows = torch.ones(n, length, dtype=torch.float64)
    if half == 0:
        inside = ((position > 0) & (position < size)).to(torch.float64)
        rise = (position > 0).to(torch.float64)
        fall = inside + (position <= 0)
    else:
        rise = 0.5 - 0.5 * torch.cos(math.pi * ((position + half) / (2 * half)).clamp(0.0, 1.0))
        fall = 0.5 + 0.5 * torch.cos(math.pi * ((position - size + half) / (2 * half)).clamp(0.0, 1.0))
    windows[1:] *= rise
    windows[:-1] *= fall
    return windows


class Tiles:
    """Equal tiles in rows and columns over a canvas, which may overlap."""

    def __init__(self, number: tuple[int, int], stride: tuple[int, int], tile: tuple[int, int]) -> None:
        self.tile = tile
        self.number = number
        self._stride = stride
        self._used = np.ones(number, dtype=bool)

    @property
    def geometry(self) -> tuple[object, ...]:
        """Number, distance and shape of the tiles, and whether they overlap (`tuple`)."""
        return self.number, self._stride, self.tile, type(self)

    def windows(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Return the weights of the pixels of the tiles, `None` where all are 1."""
        return None

    def extent(self, tile: Sequence[int]) -> tuple[int, int]:
        """Return the shape of what tiles of some shape cover."""
        y, x = ((n - 1) * step + t for n, step, t in zip(self.number, self._stride, tile, strict=True))
        return y, x

    def for_blocks(
        self,
        function: Callable[[tuple[slice, slice]], None],
        at_once: int,
        height: int,
        like: torch.Tensor,
        *,
        unused: bool = False,
    ) -> None:
        """Call a function for all blocks of at most some number of tiles, or one, that are used.

        Rows of blocks whose results of some height do not overlap may be worked on at once, so that the order
        in which results are added up is always the same.

        Parameters
        ----------
        function : `~collections.abc.Callable`
            Function of the slices of rows and columns of a block.
        at_once : `int`
            Number of tiles.
        height : `int`
            Number of rows of pixels that a tile adds to.
        like : `torch.Tensor`
            A tensor of the computation.
        unused : `bool`, optional
            Call it for the others too.
        """
        n_rows, n_columns = self.number
        width, depth = min(at_once, n_columns), min(max(1, at_once // n_columns), n_rows)
        rows = [slice(i, min(i + depth, n_rows)) for i in range(0, n_rows, depth)]
        columns = [slice(j, min(j + width, n_columns)) for j in range(0, n_columns, width)]

        def along_row(row: slice) -> None:
            for column in columns:
                if unused or self._used[row, column].any():
                    function((row, column))

        apart = max(1, -(-(height + (depth - 1) * self._stride[0]) // (depth * self._stride[0])))
        for first in range(min(apart, len(rows))):
            in_parallel(along_row, rows[first::apart], like)

    def view(
        self, image: torch.Tensor, rows: slice, columns: slice, tile: Sequence[int], before: int = 0
    ) -> torch.Tensor:
        """Return a block of tiles (..., row, column, y, x) of an image, as a view where it holds them all.

        Parameters
        ----------
        image : `torch.Tensor`, (..., y, x)
            The image; it is 0 outside.
        rows, columns : `slice`
            The block.
        tile : `~collections.abc.Sequence` [`int`]
            Shape of the tiles.
        before : `int`, optional
            How many pixels before the place of a tile it begins.
        """
        border: list[int] = []
        for dim, some, step, length in zip((-2, -1), (rows, columns), self._stride, tile, strict=True):
            first = some.start * step - before
            last = (some.stop - 1) * step - before + length
            low, high = max(first, 0), min(last, image.shape[dim])
            image = image.narrow(dim, low, high - low)
            border = [low - first, last - high, *border]
        if any(border):
            image = torch.nn.functional.pad(image, border)
        return image.unfold(-2, tile[0], self._stride[0]).unfold(-2, tile[1], self._stride[1])

    def add(self, total: torch.Tensor, rows: slice, columns: slice, values: torch.Tensor) -> None:
        """Add a block of tiles to an image on which each begins where the tile of its number does."""
        shape = values.shape[-2:]
        every = [-(-length // step) for length, step in zip(shape, self._stride, strict=True)]
        for p, q in itertools.product(range(every[0]), range(every[1])):
            some = values[..., p :: every[0], q :: every[1], :, :]
            if 0 in some.shape[-4:-2]:
                continue
            where = total
            for dim, first, step, apart, n, length in zip(
                (-2, -1),
                (rows.start + p, columns.start + q),
                self._stride,
                every,
                some.shape[-4:-2],
                shape,
                strict=True,
            ):
                where = where.narrow(dim, first * step, (n - 1) * apart * step + length)
            where = where.unfold(-2, shape[0], every[0] * self._stride[0])
            where.unfold(-2, shape[1], every[1] * self._stride[1]).add_(some)


class CellTiles(Tiles):
    """One tile a cell, as wide as its window."""

    def __init__(self, layout: CellLayout, margin: int, used: np.ndarray | None) -> None:
        stride = (layout.height, layout.width)
        super().__init__((layout.n_i, layout.n_j), stride, (stride[0] + 2 * margin, stride[1] + 2 * margin))
        self._layout = layout
        self._margin = margin
        if used is not None:
            # The windows of a cell reach into its neighbours.
            self._used = scipy.ndimage.maximum_filter(used, 3, mode="constant")

    def windows(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return windows that cross over at the borders of cells."""
        return _windows(self._layout, self._margin, dtype, device)


class EqualTiles(Tiles):
    """Tiles side by side, of a size whose FFT is fast."""

    def __init__(self, shape: tuple[int, int], halo: int) -> None:
        number = [max(1, round(length / max(_FFT_LENGTH - 2 * halo, 1))) for length in shape]
        tile = [-(-length // n) for length, n in zip(shape, number, strict=True)]
        number = [-(-length // t) for length, t in zip(shape, tile, strict=True)]
        super().__init__((number[0], number[1]), (tile[0], tile[1]), (tile[0], tile[1]))


@functools.lru_cache(maxsize=8)
def _windows(layout: CellLayout, margin: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the windows of all cells, (n_i, n_j, y, x), as an expanded product."""
    rows = _ramp_windows(layout.n_i, layout.height, margin)
    columns = _ramp_windows(layout.n_j, layout.width, margin)
    return (rows[:, None, :, None] * columns[None, :, None, :]).to(device=device, dtype=dtype)
