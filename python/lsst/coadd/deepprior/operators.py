# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Convolution with a kernel that varies from cell to cell, its adjoint, and the geometry of canvases."""

from __future__ import annotations

__all__ = ("CellConvolution", "CellLayout", "gram_kernels")

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import scipy.ndimage
import torch
import torch.nn.functional

from .parallel import in_parallel
from .tiles import CellTiles, EqualTiles, Tiles

_CACHE_BYTES = 3 * 2**19
"""Size of the tiles that a CPU transforms at once, about that of a core's own cache: 4 times faster than all
tiles of a patch at once."""

_GPU_PART = 0.1
"""Part of the free memory of a GPU that tiles may take."""

_ODD_PARTS = (1, 3, 5, 7, 9, 15, 21, 25, 27)
"""Odd parts of the lengths of FFTs, which are multiples of 16."""


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
        self._tiles: Tiles = CellTiles(layout, margin, used)
        first = kernels[..., :1, :1, :, :]
        if bool((kernels - first).abs().max() <= 4.0 * torch.finfo(kernels.dtype).eps * first.abs().max()):
            kernels = kernels[..., :1, :1, :, :]
            self._tiles = EqualTiles(self.shape, self.halo)
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

    def forward(self, model: torch.Tensor, spectra: torch.Tensor | None = None) -> torch.Tensor:
        """Apply K.

        Parameters
        ----------
        model : `torch.Tensor`, (..., y, x)
            Image on the canvas; leading dimensions broadcast with those of the kernels.
        spectra : `torch.Tensor`, (..., i, j, f, g), optional
            What `spectra` returns for the model, to save the work.

        Returns
        -------
        image : `torch.Tensor`, (..., y, x)
            K u on the canvas.
        """
        self._check(model)
        gathered = self._gathered(model)

        def predicted(block: tuple[slice, slice]) -> torch.Tensor:
            transfer = self._of_block(block)
            if spectra is None:
                spectrum = _product(gathered(block), transfer)
            else:
                spectrum = spectra[..., *block, :, :] * transfer
            inside = self._inside(self._back(spectrum))
            return inside if self._windows is None else inside.mul_(self._windows[block])

        return self._added_up(model, predicted)

    def adjoint(self, image: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of K; parameters and return value are those of `forward`."""
        self._check(image)
        given = self._given(image)

        def filtered(block: tuple[slice, slice]) -> torch.Tensor:
            return self._back(_product(given(block), self._of_block(block).conj()))

        return self._spread(image, filtered)

    @property
    def tiling(self) -> tuple[object, ...]:
        """What operators have in common that can share spectra (`tuple`)."""
        return (*self._tiles.geometry, self._fft_shape, self.halo)

    def spectra(self, model: torch.Tensor) -> torch.Tensor:
        """Transform a model for the `forward` of all operators of this tiling, (..., i, j, f, g)."""
        self._check(model)
        gathered, result = self._gathered(model), self.no_spectra(model)

        def transform(block: tuple[slice, slice]) -> None:
            result[..., *block, :, :] = gathered(block)

        self._tiles.for_blocks(transform, self._at_once(model, model.shape[:-2]), 0, model, unused=True)
        return result

    def no_spectra(self, image: torch.Tensor) -> torch.Tensor:
        """Return spectra of nothing for an image of this shape, (..., i, j, f, g)."""
        ny, nx = self._fft_shape
        shape = (*image.shape[:-2], *self._tiles.number, ny, nx // 2 + 1)
        return image.new_zeros(shape, dtype=image.dtype.to_complex())

    def add_adjoint(self, image: torch.Tensor, spectra: torch.Tensor) -> None:
        """Add the conjugate spectra of K^T y to those of other operators of this tiling.

        Parameters
        ----------
        image : `torch.Tensor`, (..., y, x)
            Image y on the canvas.
        spectra : `torch.Tensor`, (..., i, j, f, g)
            What is added to.
        """
        self._check(image)
        given = self._given(image)

        def add(block: tuple[slice, slice]) -> None:
            spectra[..., *block, :, :].addcmul_(given(block).conj_physical_(), self._of_block(block))

        self._tiles.for_blocks(add, self._at_once(image, image.shape[:-2]), 0, image)

    def adjoint_of(self, spectra: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the image of spectra that `add_adjoint` has added up, (..., y, x), like another image."""
        return self._spread(
            like, lambda block: self._back(spectra[..., *block, :, :].conj_physical()), unused=True
        )

    def _gathered(self, image: torch.Tensor) -> Callable[[tuple[slice, slice]], torch.Tensor]:
        """Return a function that transforms the tiles of a block, with their halos."""
        # Pixels beyond the tile and its halo wrap around to nowhere.
        tiles, shape, halo = self._tiles, self._fft_shape, self.halo
        return lambda block: torch.fft.rfft2(tiles.view(image, *block, shape, halo))

    def _given(self, image: torch.Tensor) -> Callable[[tuple[slice, slice]], torch.Tensor]:
        """Return a function that transforms the tiles of a block as an adjoint takes them: weighted with
        their windows and without their halos, where there are windows.
        """
        (height, width), halo, windows = self._tiles.tile, self.halo, self._windows
        if windows is None:
            return self._gathered(image)

        def transform(block: tuple[slice, slice]) -> torch.Tensor:
            # Zeros around the tile keep what wraps around apart.
            here = self._tiles.view(image, *block, self._tiles.tile)
            padded = image.new_zeros((*here.shape[:-2], *self._fft_shape))
            inside = padded[..., halo : halo + height, halo : halo + width]
            torch.mul(here, windows[block], out=inside)
            return torch.fft.rfft2(padded)

        return transform

    def _back(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Return the tiles of a spectrum, with their halos."""
        return torch.fft.irfft2(spectrum, s=self._fft_shape)

    def _of_block(self, block: tuple[slice, slice]) -> torch.Tensor:
        """Return the transfer functions of a block."""
        return self._transfer if self._windows is None else self._transfer[..., *block, :, :]

    def _inside(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return tiles without their halos."""
        (height, width), halo = self._tiles.tile, self.halo
        return tiles[..., halo : halo + height, halo : halo + width]

    def _added_up(
        self,
        image: torch.Tensor,
        result: Callable[[tuple[slice, slice]], torch.Tensor],
        *,
        unused: bool = False,
    ) -> torch.Tensor:
        """Add up the tiles without halos of all blocks."""
        lead = self._lead(image)
        total = image.new_zeros((*lead, *self._tiles.extent(self._tiles.tile)))
        self._tiles.for_blocks(
            lambda block: self._tiles.add(total, *block, result(block)),
            self._at_once(image, lead),
            self._tiles.tile[0],
            image,
            unused=unused,
        )
        return total[..., : self.shape[0], : self.shape[1]]

    def _spread(
        self,
        image: torch.Tensor,
        filtered: Callable[[tuple[slice, slice]], torch.Tensor],
        *,
        unused: bool = False,
    ) -> torch.Tensor:
        """Add up what an adjoint has made of the tiles of all blocks: with their halos, but where they came
        with them.
        """
        if self._windows is None:
            return self._added_up(image, lambda block: self._inside(filtered(block)), unused=unused)
        (height, width), halo, lead = self._tiles.tile, self.halo, self._lead(image)
        total = image.new_zeros((*lead, *(n + 2 * halo for n in self.shape)))

        def spread(block: tuple[slice, slice]) -> None:
            self._tiles.add(total, *block, filtered(block)[..., : height + 2 * halo, : width + 2 * halo])

        self._tiles.for_blocks(spread, self._at_once(image, lead), height + 2 * halo, image, unused=unused)
        return total[..., halo : halo + self.shape[0], halo : halo + self.shape[1]]

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


def _product(spectrum: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
    """Multiply a spectrum, which may be overwritten, by transfer functions."""
    if spectrum.shape[:-4] == transfer.shape[:-4] or transfer.ndim == 4:
        spectrum *= transfer
        return spectrum
    return spectrum * transfer


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
