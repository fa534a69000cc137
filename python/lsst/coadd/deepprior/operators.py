# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Convolution with a kernel that varies from cell to cell, its adjoint, and the geometry of canvases."""

from __future__ import annotations

__all__ = ("CellConvolution", "CellLayout", "gram_kernels")

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import scipy.ndimage
import torch
import torch.nn.functional

from .parallel import in_parallel

_CACHE_BYTES = 3 * 2**19
"""Size of the tiles that a CPU transforms at once, about that of a core's own cache: 4 times faster than all
tiles of a patch at once."""

_GPU_PART = 0.1
"""Part of the free memory of a GPU that tiles may take."""

_ODD_PARTS = (1, 3, 5, 7, 9, 15, 21, 25, 27)
"""Odd parts of the lengths of FFTs, which are multiples of 16."""

_FFT_LENGTH = 512
"""About the length of the FFT where it can be chosen."""


@dataclasses.dataclass(frozen=True)
class CellLayout:
    """Grid of equal cells that covers a patch.

    Parameters
    ----------
    n_i, n_j : `int`
        Number of rows and columns of cells.
    height, width : `int`
        Shape of a cell in pixels.
    """

    n_i: int
    n_j: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.n_i, self.n_j, self.height, self.width) < 1:
            raise ValueError(f"A cell layout needs at least one cell of at least one pixel, not {self}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (y, x) of the patch in pixels (`tuple` [`int`, `int`])."""
        return self.n_i * self.height, self.n_j * self.width

    def cell_slice(self, i: int, j: int) -> tuple[slice, slice]:
        """Return the slices of the patch array that select cell (i, j)."""
        return (
            slice(i * self.height, (i + 1) * self.height),
            slice(j * self.width, (j + 1) * self.width),
        )

    def canvas_shape(self, margin: int) -> tuple[int, int]:
        """Return the shape of the patch with a margin on all sides."""
        return self.shape[0] + 2 * margin, self.shape[1] + 2 * margin


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


class CellConvolution:
    r"""Convolution with one kernel a cell, blended smoothly over the borders of the cells.

    On a canvas (the patch with a margin) the operator is

    .. math:: (K u)(p) = \sum_c W_c(p)\, (k_c * u)(p), \qquad \sum_c W_c = 1,

    the efficient filter flow of Hirsch et al. (2010, CVPR 607) with windows on the output, and its adjoint is
    :math:`K^T y = \sum_c k_c^T * (W_c y)`; outside the canvas u is zero. Each cell is convolved by FFT on a
    tile with a halo as wide as its kernel, so nothing wraps around. If all cells have the same kernel, tiles
    of a size that suits the FFT take the place of the cells, and need no blending.

    Parameters
    ----------
    kernels : `torch.Tensor`, (..., n_i, n_j, k, k)
        Odd-sized kernels; leading dimensions are independent operators that act on the leading dimensions of
        the model.
    layout : `CellLayout`
        Cells of the patch.
    margin : `int`
        Width of the canvas around the patch and half-width of the blending, in pixels.
    used : `numpy.ndarray`, (n_i, n_j), bool, optional
        Cells whose own pixels are needed of `forward`, or are not 0 in the image that `adjoint` takes; what
        depends on others alone is left out.

    Notes
    -----
    Shapes, device and dtype are fixed at construction by ``kernels``. Tiles are transformed a few at a time:
    on a CPU as many as its cache holds, on a GPU as many as there is memory for.
    """

    def __init__(
        self, kernels: torch.Tensor, layout: CellLayout, margin: int, used: np.ndarray | None = None
    ) -> None:
        if kernels.ndim < 4 or kernels.shape[-4:-2] != (layout.n_i, layout.n_j):
            raise ValueError(
                f"Kernels of shape {tuple(kernels.shape)} do not end in (n_i, n_j, k, k) for {layout.n_i} x "
                f"{layout.n_j} cells."
            )
        k = kernels.shape[-1]
        if kernels.shape[-2] != k or k % 2 == 0:
            raise ValueError(f"Kernels must be odd-sized squares, not {tuple(kernels.shape[-2:])}.")
        if not bool(torch.isfinite(kernels).all()):
            raise ValueError("Kernels must be finite; fill the cells without a PSF and mask their pixels.")
        self.shape = layout.canvas_shape(margin)
        self.halo = k // 2
        self._batch = kernels.shape[:-4]
        self._tiles: _Tiles = _CellTiles(layout, margin, used)
        first = kernels[..., :1, :1, :, :]
        if bool((kernels - first).abs().max() <= 4.0 * torch.finfo(kernels.dtype).eps * first.abs().max()):
            kernels = kernels[..., :1, :1, :, :]
            self._tiles = _EqualTiles(self.shape, self.halo)
        tile = self._tiles.tile
        self._fft_shape = tuple(_fast_length(t + 2 * self.halo) for t in tile)
        self._windows = self._tiles.windows(kernels.dtype, kernels.device)
        self._transfer = self._transfer_of(kernels)

    def _transfer_of(self, kernels: torch.Tensor) -> torch.Tensor:
        """Return the transfer functions of kernels, whose centre is moved to the first pixel."""
        k, (ny, nx) = kernels.shape[-1], self._fft_shape
        flat = kernels.reshape(-1, k, k)
        transfer = torch.empty(
            (len(flat), ny, nx // 2 + 1), dtype=kernels.dtype.to_complex(), device=kernels.device
        )
        step = _tiles_at_once(ny * nx, kernels)

        def transform(first: int) -> None:
            some = flat[first : first + step]
            padded = torch.nn.functional.pad(some, (0, nx - k, 0, ny - k))
            centred = torch.roll(padded, (-self.halo, -self.halo), dims=(-2, -1))
            transfer[first : first + step] = torch.fft.rfft2(centred)

        in_parallel(transform, range(0, len(flat), step), kernels)
        return transfer.reshape(*kernels.shape[:-2], ny, nx // 2 + 1)

    @property
    def nbytes(self) -> int:
        """Memory of the transfer functions (`int`)."""
        return self._transfer.untyped_storage().nbytes()

    @property
    def gain(self) -> torch.Tensor:
        """Largest factor by which a wave is amplified beyond a constant image, in any cell
        (`torch.Tensor`, (...)).
        """
        largest, constant = self._transfer.abs().amax(dim=(-2, -1)), self._transfer[..., 0, 0].abs()
        return torch.where(constant > 0.0, largest / constant, 0.0).amax(dim=(-2, -1))

    def __getitem__(self, index: int | slice) -> CellConvolution:
        """Select one or several of the operators of the leading dimension."""
        selected = copy.copy(self)
        selected._transfer = self._transfer[index]
        selected._batch = selected._transfer.shape[:-4]
        return selected

    def forward(self, model: torch.Tensor) -> torch.Tensor:
        """Apply K.

        Parameters
        ----------
        model : `torch.Tensor`, (..., y, x)
            Image on the canvas; leading dimensions broadcast with those of the kernels.

        Returns
        -------
        image : `torch.Tensor`, (..., y, x)
            K u on the canvas.
        """
        self._check(model)
        return self._apply(model, self._windows, adjoint=False)

    def adjoint(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of K; parameters and return value are those of `forward`."""
        self._check(image)
        windows = self._windows
        if windows is None:
            return self._apply(image, None, adjoint=True)
        tiles, halo = self._tiles, self.halo
        lead = self._lead(image)
        total = image.new_zeros((*lead, *(n + 2 * halo for n in self.shape)))
        height, width = tiles.tile

        def spread(block: tuple[slice, slice]) -> None:
            # Zeros around the tile keep what wraps around apart.
            here = tiles.view(image, *block, tiles.tile)
            padded = image.new_zeros((*here.shape[:-2], *self._fft_shape))
            inside = padded[..., halo : halo + height, halo : halo + width]
            torch.mul(here, windows[block], out=inside)
            result = self._filter(padded, self._transfer[..., *block, :, :].conj())
            tiles.add(total, *block, result[..., : height + 2 * halo, : width + 2 * halo])

        tiles.for_blocks(spread, self._at_once(image, lead), height + 2 * halo, image)
        return total[..., halo : halo + self.shape[0], halo : halo + self.shape[1]]

    def _apply(self, image: torch.Tensor, windows: torch.Tensor | None, *, adjoint: bool) -> torch.Tensor:
        """Convolve tile by tile and add up what is inside the tiles, weighted with windows if there are."""
        tiles, halo = self._tiles, self.halo
        lead = self._lead(image)
        after = [need - have for need, have in zip(tiles.extent(self._fft_shape), self.shape, strict=True)]
        # Pixels beyond the tile and its halo wrap around to nowhere.
        padded = torch.nn.functional.pad(
            image, (halo, max(after[1] - halo, 0), halo, max(after[0] - halo, 0))
        )
        total = image.new_zeros((*lead, *tiles.extent(tiles.tile)))
        height, width = tiles.tile

        def convolve(block: tuple[slice, slice]) -> None:
            transfer = self._transfer if windows is None else self._transfer[..., *block, :, :]
            here = tiles.view(padded, *block, self._fft_shape)
            result = self._filter(here, transfer.conj() if adjoint else transfer)
            result = result[..., halo : halo + height, halo : halo + width]
            tiles.add(total, *block, result if windows is None else result * windows[block])

        tiles.for_blocks(convolve, self._at_once(image, lead), height, image)
        return total[..., : self.shape[0], : self.shape[1]]

    def _lead(self, image: torch.Tensor) -> Sequence[int]:
        """Return the leading dimensions of what comes of an image."""
        if image.ndim == 2 or not self._batch:
            return image.shape[:-2] if image.ndim > 2 else self._batch
        return torch.broadcast_shapes(image.shape[:-2], self._batch)

    def _at_once(self, image: torch.Tensor, lead: Sequence[int]) -> int:
        return _tiles_at_once(math.prod(lead) * math.prod(self._fft_shape), image)

    def _check(self, image: torch.Tensor) -> None:
        if image.shape[-2:] != self.shape:
            raise ValueError(
                f"An image of shape {tuple(image.shape)} is not on the canvas of shape {self.shape}."
            )

    def _filter(self, tiles: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
        """Multiply tiles of the FFT shape by a transfer function."""
        spectrum = torch.fft.rfft2(tiles)
        if spectrum.shape[:-4] == transfer.shape[:-4] or transfer.ndim == 4:
            spectrum *= transfer
        else:
            spectrum = spectrum * transfer
        return torch.fft.irfft2(spectrum, s=self._fft_shape)


def _fast_length(least: int) -> int:
    """Return the length of an FFT, not below some length, that takes least time.

    Odd lengths, and those with few factors of 2, take longer than somewhat larger ones.
    """
    powers = (16 * 2**n for n in range(max(least, 1).bit_length()))
    return min(odd * power for power, odd in itertools.product(powers, _ODD_PARTS) if odd * power >= least)


def _tiles_at_once(n_pixels: int, like: torch.Tensor) -> int:
    """Return how many tiles of a number of pixels are transformed together."""
    if like.device.type != "cuda":
        return max(1, _CACHE_BYTES // (like.element_size() * n_pixels))
    free, _ = torch.cuda.mem_get_info(like.device)
    # What torch holds without need is free as well.
    free += torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
    return max(1, int(_GPU_PART * free) // (4 * like.element_size() * n_pixels))


class _Tiles:
    """Equal tiles in rows and columns over a canvas, which may overlap."""

    def __init__(self, number: tuple[int, int], stride: tuple[int, int], tile: tuple[int, int]) -> None:
        self.tile = tile
        self._number = number
        self._stride = stride
        self._used = np.ones(number, dtype=bool)

    def windows(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Return the weights of the pixels of the tiles, `None` where all are 1."""
        return None

    def extent(self, tile: Sequence[int]) -> tuple[int, int]:
        """Return the shape of what tiles of some shape cover."""
        y, x = ((n - 1) * step + t for n, step, t in zip(self._number, self._stride, tile, strict=True))
        return y, x

    def for_blocks(
        self,
        function: Callable[[tuple[slice, slice]], None],
        at_once: int,
        height: int,
        like: torch.Tensor,
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
        """
        n_rows, n_columns = self._number
        width, depth = min(at_once, n_columns), min(max(1, at_once // n_columns), n_rows)
        rows = [slice(i, min(i + depth, n_rows)) for i in range(0, n_rows, depth)]
        columns = [slice(j, min(j + width, n_columns)) for j in range(0, n_columns, width)]

        def along_row(row: slice) -> None:
            for column in columns:
                if self._used[row, column].any():
                    function((row, column))

        apart = -(-(height + (depth - 1) * self._stride[0]) // (depth * self._stride[0]))
        for first in range(min(apart, len(rows))):
            in_parallel(along_row, rows[first::apart], like)

    def view(self, image: torch.Tensor, rows: slice, columns: slice, tile: Sequence[int]) -> torch.Tensor:
        """Return a block of tiles (..., row, column, y, x) of an image, as a view."""
        for dim, some, step, length in zip((-2, -1), (rows, columns), self._stride, tile, strict=True):
            image = image.narrow(dim, some.start * step, (some.stop - some.start - 1) * step + length)
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


class _CellTiles(_Tiles):
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
        return _windows(self._layout, self._margin, dtype, device)


class _EqualTiles(_Tiles):
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


def gram_kernels(kernels: torch.Tensor) -> torch.Tensor:
    r"""Compute the kernels of :math:`K^T K` cell by cell, the autocorrelation of every kernel.

    Parameters
    ----------
    kernels : `torch.Tensor`, (..., k, k)
        Odd-sized kernels.

    Returns
    -------
    gram : `torch.Tensor`, (..., 2k - 1, 2k - 1)
        ``sum_p kernel(p) kernel(p + q)`` with q = 0 at the central pixel.
    """
    k = kernels.shape[-1]
    size = scipy.fft.next_fast_len(2 * k - 1, real=True)
    power = torch.fft.rfft2(kernels, s=(size, size)).abs().square()
    correlation = torch.roll(torch.fft.irfft2(power, s=(size, size)), (k - 1, k - 1), dims=(-2, -1))
    return correlation[..., : 2 * k - 1, : 2 * k - 1]
