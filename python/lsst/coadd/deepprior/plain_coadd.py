# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The plain coadd that sources are fitted to, with the noise and the PSF of each cell."""

from __future__ import annotations

__all__ = ("Coadd",)

import copy
from collections.abc import Callable

import numpy as np
import scipy.ndimage

from .psf import carry_kernel, convolve_full, fwhm, shift_stamp
from .stamps import Stamp

_FEEBLE = 1e-3
"""Part of the light of a source below which that in another cell is drawn with the PSF of its own."""


class Coadd:
    """The plain coadd as model plus residual, with its noise and its PSF in each cell.

    Parameters
    ----------
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy, finite.
    target_sigma : `float`
        Sigma in pixels of the Gaussian PSF of ``model``.
    residual : `numpy.ndarray`, (y, x)
        Coadd of data minus model in nJy, NaN where there is no data.
    variance : `numpy.ndarray`, (y, x)
        Variance of ``residual`` in nJy^2; what is not positive is taken as no data.
    psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF of ``residual`` in each cell, odd size, unit sum; NaN in missing cells.
    noise_correlation : `numpy.ndarray`, (k, k), optional
        Correlation of the noise of ``residual`` by lag (see
        `~lsst.coadd.deepprior.noise_correlation.noise_correlation`); without it the noise is white.

    Attributes
    ----------
    image : `numpy.ndarray`, (y, x)
        The model carried to the coadd PSF plus the residual, in nJy; 0 where there is no data.
    good : `numpy.ndarray`, (y, x), bool
        Pixels with data.
    weight : `numpy.ndarray`, (y, x)
        One weight a cell, the inverse of its median variance; 0 where there is no data.
    matched : `numpy.ndarray`, (y, x)
        Sum of ``weight`` under the squared PSF at each pixel: what a matched filter is divided by.
    information : `numpy.ndarray`, (y, x)
        Inverse variance of the flux of a point source at each pixel, in nJy^-2, the correlation of the noise
        included.
    fwhm : `numpy.ndarray`, (cell_i, cell_j)
        FWHM of the PSF in pixels; in missing cells the median of the others.

    Raises
    ------
    ValueError
        Raised if the images have not one shape, or the cells of ``psf`` do not divide it.

    Notes
    -----
    Sources in missing cells cast light into others. They are drawn with the PSF of the nearest of these.
    """

    def __init__(
        self,
        model: np.ndarray,
        target_sigma: float,
        residual: np.ndarray,
        variance: np.ndarray,
        psf: np.ndarray,
        noise_correlation: np.ndarray | None = None,
    ) -> None:
        self.shape = model.shape
        self.noise_correlation = np.ones((1, 1)) if noise_correlation is None else noise_correlation
        self.psf = psf
        for name, image in (("residual", residual), ("variance", variance)):
            if image.shape != self.shape:
                raise ValueError(
                    f"The {name} is {image.shape} and the model {self.shape}; they must be equal."
                )
        n_i, n_j = psf.shape[:2]
        if self.shape[0] % n_i or self.shape[1] % n_j:
            raise ValueError(
                f"PSFs of {n_i}x{n_j} cells do not fit an image of {self.shape}: give one for each cell, all "
                "cells being equally large."
            )
        self.height, self.width = self.shape[0] // n_i, self.shape[1] // n_j
        self.fwhm = np.full((n_i, n_j), np.nan)
        self.kernels = np.full(psf.shape, np.nan)
        # The cell whose PSF draws what is in a cell: the first with an equal one, or that of the nearest.
        self._psf_cell: dict[tuple[int, int], tuple[int, int]] = {}
        done: dict[bytes, tuple[int, int]] = {}
        for i, j in np.ndindex(n_i, n_j):
            stamp = psf[i, j]
            if np.isfinite(stamp).all():
                first = done.setdefault(stamp.tobytes(), (i, j))  # constant PSFs are common
                self._psf_cell[i, j] = first
                if first == (i, j):
                    self.fwhm[i, j] = fwhm(stamp)
                    self.kernels[i, j] = carry_kernel(stamp, target_sigma)
                else:
                    self.fwhm[i, j], self.kernels[i, j] = self.fwhm[first], self.kernels[first]

        known = np.isfinite(self.fwhm)
        if known.any():
            _, nearest = scipy.ndimage.distance_transform_edt(~known, return_indices=True)
            for i, j in np.argwhere(~known).tolist():
                self._psf_cell[i, j] = self._psf_cell[tuple(nearest[:, i, j].tolist())]
            self.fwhm[~known] = np.nanmedian(self.fwhm)
        self.good = np.isfinite(residual) & np.isfinite(variance) & (variance > 0.0)
        self.variance = np.where(self.good, variance, 0.0)
        self.weight = np.zeros(self.shape)
        for i, j in np.ndindex(n_i, n_j):
            cell = np.s_[i * self.height : (i + 1) * self.height, j * self.width : (j + 1) * self.width]
            if (good := self.good[cell]).any():
                self.weight[cell] = good / np.median(variance[cell][good])
        self.image = np.where(self.good, self.carry(Stamp(0, 0, model)).array + residual, 0.0)
        self.matched = np.maximum(self.correlate(self.weight, power=2), 0.0)
        self.information = self._information()

    def correlated(self, noise_correlation: np.ndarray) -> Coadd:
        """Return the same coadd with another correlation of its noise.

        Parameters
        ----------
        noise_correlation : `numpy.ndarray`, (k, k)
            Correlation by lag.

        Returns
        -------
        coadd : `Coadd`
            The coadd, which shares its images with this one.
        """
        other = copy.copy(self)
        other.noise_correlation = noise_correlation
        other.information = other._information()
        return other

    def without(self, light: float | np.ndarray) -> Coadd:
        """Return the same coadd with a constant sky or an image, in nJy a pixel, subtracted."""
        other = copy.copy(self)
        other.image = np.where(self.good, self.image - light, 0.0)
        return other

    def _information(self) -> np.ndarray:
        """Return the inverse variance of point-source fluxes, (y, x)."""
        information = self.matched.copy()
        for i, j in np.ndindex(self.psf.shape[:2]):
            if np.isfinite(self.psf[i, j]).all():
                cell = np.s_[i * self.height : (i + 1) * self.height, j * self.width : (j + 1) * self.width]
                information[cell] /= self.noise_excess(self.psf[i, j])
        return information

    def noise_excess(self, weights: np.ndarray) -> float:
        """Return the variance of a weighted sum of pixels over that of white noise of the same variance.

        Parameters
        ----------
        weights : `numpy.ndarray`, (y, x)
            Weights of neighbouring pixels of equal variance.

        Returns
        -------
        excess : `float`
            The ratio, 1 for white noise.
        """
        if self.noise_correlation.size == 1:
            return 1.0
        smooth = convolve_full(weights, self.noise_correlation)
        half = self.noise_correlation.shape[0] // 2
        total = float((weights * smooth[half:-half, half:-half]).sum() / (weights**2).sum())
        return max(total, 1e-3)  # a measured correlation need not be positive definite

    def cell(self, y: float, x: float) -> tuple[int, int]:
        """Return the cell that holds a position in array coordinates."""
        return (
            min(max(round(y) // self.height, 0), self.psf.shape[0] - 1),
            min(max(round(x) // self.width, 0), self.psf.shape[1] - 1),
        )

    def fwhm_at(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the FWHM in pixels of the PSF at positions in array coordinates, (source,)."""
        return np.array([self.fwhm[self.cell(*position)] for position in zip(y, x, strict=True)])

    def convolve(self, stamp: Stamp, kernels: np.ndarray) -> Stamp:
        """Convolve a stamp; each pixel of the result uses the kernel of its own cell, and is 0 in missing
        cells.
        """
        half = kernels.shape[-1] // 2
        ys, xs = stamp.slices
        y0, y1 = max(ys.start - half, 0), min(ys.stop + half, self.shape[0])
        x0, x1 = max(xs.start - half, 0), min(xs.stop + half, self.shape[1])
        result = np.zeros((y1 - y0, x1 - x0))
        for i in range(y0 // self.height, (y1 - 1) // self.height + 1):
            for j in range(x0 // self.width, (x1 - 1) // self.width + 1):
                if not np.isfinite(kernels[i, j, 0, 0]):
                    continue
                oy0, oy1 = max(y0, i * self.height), min(y1, (i + 1) * self.height)
                ox0, ox1 = max(x0, j * self.width), min(x1, (j + 1) * self.width)
                iy0, iy1 = max(ys.start, oy0 - half), min(ys.stop, oy1 + half)
                ix0, ix1 = max(xs.start, ox0 - half), min(xs.stop, ox1 + half)
                source = stamp.array[iy0 - ys.start : iy1 - ys.start, ix0 - xs.start : ix1 - xs.start]
                full = convolve_full(source.astype(float), kernels[i, j])
                result[oy0 - y0 : oy1 - y0, ox0 - x0 : ox1 - x0] = full[
                    oy0 - iy0 + half : oy1 - iy0 + half, ox0 - ix0 + half : ox1 - ix0 + half
                ]
        return Stamp(y0, x0, result)

    def carry(self, stamp: Stamp) -> Stamp:
        """Carry a piece of the restored image to the coadd PSF."""
        return self.convolve(stamp, self.kernels)

    def correlate(self, image: np.ndarray, power: int) -> np.ndarray:
        """Sum an image under the PSF, to some power, centred on each pixel."""
        return self.convolve(Stamp(0, 0, image), self.psf[:, :, ::-1, ::-1] ** power).array

    def psf_at(self, y: float, x: float) -> np.ndarray:
        """Return the PSF (k, k) at a position; in missing cells it is that of the nearest other cell."""
        return self.psf[self._psf_cell[self.cell(y, x)]]

    def drawn(self, y: float, x: float, draw: Callable[[np.ndarray], Stamp]) -> Stamp:
        """Draw a source; each pixel of the result has the PSF of its own cell, as the data have.

        Parameters
        ----------
        y, x : `float`
            Position of the source in array coordinates.
        draw : `~collections.abc.Callable`
            Function of a PSF (k, k) that returns the source with that PSF, in the same box for all.

        Returns
        -------
        source : `Stamp`
            The part of the source in the patch.
        """
        own = self._psf_cell[self.cell(y, x)]
        whole = draw(self.psf[own]).cropped(self.shape)
        ys, xs = whole.slices
        result = whole.array.copy()
        for i in range(ys.start // self.height, (ys.stop - 1) // self.height + 1):
            for j in range(xs.start // self.width, (xs.stop - 1) // self.width + 1):
                part = (
                    slice(max(i * self.height - ys.start, 0), (i + 1) * self.height - ys.start),
                    slice(max(j * self.width - xs.start, 0), (j + 1) * self.width - xs.start),
                )
                enough = np.abs(whole.array[part]).sum() > _FEEBLE * np.abs(whole.array).sum()
                if enough and self._psf_cell[i, j] != own:
                    result[part] = draw(self.psf[self._psf_cell[i, j]]).cropped(self.shape).array[part]
        return whole._replace(array=result)

    def point(self, y: float, x: float) -> Stamp:
        """Return a point source of unit flux."""
        iy, ix, half = round(y), round(x), self.psf.shape[-1] // 2
        return self.drawn(y, x, lambda psf: Stamp(iy - half, ix - half, shift_stamp(psf, x - ix, y - iy)))
