# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Convolution with a kernel that varies from cell to cell, its adjoint, and the geometry of canvases."""

from __future__ import annotations

__all__ = ("CellConvolution", "CellLayout", "gram_kernels")

import copy
import dataclasses
import math

import scipy.fft
import torch
import torch.nn.functional


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
    tile with a halo as wide as its kernel, so nothing wraps around. If all cells have the same kernel the
    whole canvas is one tile.

    Parameters
    ----------
    kernels : `torch.Tensor`, (..., n_i, n_j, k, k)
        Odd-sized kernels; leading dimensions are independent operators that act on the leading dimensions of
        the model.
    layout : `CellLayout`
        Cells of the patch.
    margin : `int`
        Width of the canvas around the patch and half-width of the blending, in pixels.

    Notes
    -----
    Shapes, device and dtype are fixed at construction by ``kernels``.
    """

    def __init__(self, kernels: torch.Tensor, layout: CellLayout, margin: int) -> None:
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
        if bool((kernels == kernels[..., :1, :1, :, :]).all()):
            kernels = kernels[..., :1, :1, :, :]
            layout = CellLayout(1, 1, *layout.shape)
        self._layout = layout
        self._tile = (layout.height + 2 * margin, layout.width + 2 * margin)
        self._fft_shape = tuple(scipy.fft.next_fast_len(t + 2 * self.halo, real=True) for t in self._tile)
        windows_y = _ramp_windows(layout.n_i, layout.height, margin)
        windows_x = _ramp_windows(layout.n_j, layout.width, margin)
        self._single = layout.n_i * layout.n_j == 1
        self._windows = (windows_y[:, None, :, None] * windows_x[None, :, None, :]).to(
            device=kernels.device, dtype=kernels.dtype
        )
        padded = torch.nn.functional.pad(kernels, (0, self._fft_shape[1] - k, 0, self._fft_shape[0] - k))
        centred = torch.roll(padded, (-self.halo, -self.halo), dims=(-2, -1))
        self._transfer = torch.fft.rfft2(centred)

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
        halo = self.halo
        padded = torch.nn.functional.pad(model, (halo, halo, halo, halo))
        tiles = self._gather(padded, halo)
        convolved = self._filter(tiles, self._transfer)
        inner = convolved[..., halo : halo + self._tile[0], halo : halo + self._tile[1]]
        return inner[..., 0, 0, :, :] if self._single else self._scatter(inner * self._windows, 0)

    def adjoint(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of K; parameters and return value are those of `forward`."""
        self._check(image)
        halo = self.halo
        tiles = self._gather(image, 0) * self._windows
        padded = torch.nn.functional.pad(tiles, (halo, halo, halo, halo))
        convolved = self._filter(padded, self._transfer.conj())
        spread = convolved[..., : self._tile[0] + 2 * halo, : self._tile[1] + 2 * halo]
        whole = spread[..., 0, 0, :, :] if self._single else self._scatter(spread, halo)
        return whole[..., halo:-halo, halo:-halo] if halo else whole

    def _check(self, image: torch.Tensor) -> None:
        if image.shape[-2:] != self.shape:
            raise ValueError(
                f"An image of shape {tuple(image.shape)} is not on the canvas of shape {self.shape}."
            )

    def _gather(self, padded: torch.Tensor, halo: int) -> torch.Tensor:
        """Cut a padded canvas into overlapping tiles (..., n_i, n_j, tile_y, tile_x)."""
        if self._single:
            return padded[..., None, None, :, :]
        tile = (self._tile[0] + 2 * halo, self._tile[1] + 2 * halo)
        return padded.unfold(-2, tile[0], self._layout.height).unfold(-2, tile[1], self._layout.width)

    def _scatter(self, tiles: torch.Tensor, halo: int) -> torch.Tensor:
        """Add overlapping tiles up to a padded canvas: the transpose of `_gather`."""
        canvas = tiles.new_zeros(*tiles.shape[:-4], self.shape[0] + 2 * halo, self.shape[1] + 2 * halo)
        for i in range(self._layout.n_i):
            y = slice(i * self._layout.height, i * self._layout.height + tiles.shape[-2])
            for j in range(self._layout.n_j):
                x = slice(j * self._layout.width, j * self._layout.width + tiles.shape[-1])
                canvas[..., y, x] += tiles[..., i, j, :, :]
        return canvas

    def _filter(self, tiles: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
        """Multiply tiles, zero-padded to the FFT shape, by a transfer function."""
        return torch.fft.irfft2(torch.fft.rfft2(tiles, s=self._fft_shape) * transfer, s=self._fft_shape)


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
