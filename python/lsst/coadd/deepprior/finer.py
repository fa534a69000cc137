# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""A latent and published grid that is finer than that of the visits.

A pixel of a visit is the sky, seen through a PSF that has the pixel's response in it, at one point: the
centre of the pixel. On a grid k times finer the same visit is therefore known at one of k x k pixels, and

.. math:: y(X) = k^2\, (f_t * s)(p), \qquad p = k X + \tfrac12 (k - 1),

with X the centre of a pixel of the visit, in its own pixels, p the same point in fine pixels, and f the PSF
sampled at fine pixels. The factor makes the fine pixels of a source add up to its flux. Fine pixel 0 begins
where pixel 0 of the visit begins, so that k x k fine pixels are one of the visit's, boxes and cells are k
times larger, and with an even k the centre of a pixel lies between fine pixels, half a pixel beyond the one
that stands for it: its PSF stamps are shifted by as much.

Here a visit becomes one of the fine grid in which only those pixels are good. That is all that the rest needs
to know, and what it finds out of single pixels of visits is spread over k x k fine pixels in the end.
"""

from __future__ import annotations

__all__ = (
    "OVERSAMPLINGS",
    "block_correlation",
    "check_oversampling",
    "finer_layout",
    "finer_observation",
    "finer_psf",
    "own_stamp",
    "repeated",
    "spread_layers",
    "spread_psf",
)

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.optimize

from .observation import Observation
from .psf import fwhm, shift_stamp

if TYPE_CHECKING:
    from .noise import CoaddLayers
    from .operators import CellLayout

OVERSAMPLINGS = (2, 3)
"""Factors by which the grid can be finer."""

_PIXEL_NODES, _PIXEL_WEIGHTS = (np.polynomial.legendre.leggauss(3)[0] / 2.0, np.array([5.0, 8.0, 5.0]) / 18.0)
"""Points and weights of the integral over a pixel along one axis (Gauss-Legendre)."""


def check_oversampling(oversampling: int) -> None:
    """Raise `ValueError` if the grid cannot be finer by this factor."""
    if oversampling not in OVERSAMPLINGS:
        raise ValueError(f"The oversampling must be 2 or 3, not {oversampling}.")


def _shift(oversampling: int) -> float:
    """Return how far the centre of a pixel is beyond that of the fine pixel that stands for it."""
    return 0.0 if oversampling % 2 else 0.5


def _moffat(parameters: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return an elliptical Moffat profile, integrated over pixels, at positions along both axes, (y, x)."""
    amplitude, x0, y0, log_a, log_b, c, log_beta = parameters
    y = (y[:, None] + _PIXEL_NODES)[:, :, None, None] - y0
    x = (x[:, None] + _PIXEL_NODES)[None, None] - x0
    distance = (math.exp(log_a) * x + c * y) ** 2 + (math.exp(log_b) * y) ** 2
    profile = amplitude * (1.0 + distance) ** -(1.0 + math.exp(log_beta))
    return np.einsum("yaxb,a,b->yx", profile, _PIXEL_WEIGHTS, _PIXEL_WEIGHTS)


def _finer_stamp(stamp: np.ndarray, oversampling: int, shift: float) -> np.ndarray:
    """Sample a PSF at fine pixels, (k, k) to (K, K)."""
    half = stamp.shape[0] // 2
    centres = np.arange(-half, half + 1.0)
    positions = (np.arange(-half * oversampling, half * oversampling + 1.0) + shift) / oversampling
    peak = stamp.max()
    width = math.log(1.5 / fwhm(stamp))

    def difference(parameters: np.ndarray) -> np.ndarray:
        return (_moffat(parameters, centres, centres) - stamp / peak).ravel()

    start = np.array([1.2, 0.0, 0.0, width, width, 0.0, 0.9])
    upper = np.array([4.0, 1.0, 1.0, 3.0, 3.0, 20.0, 5.0])
    lower = np.append(0.0, -upper[1:])
    fit = scipy.optimize.least_squares(difference, np.clip(start, lower, upper), bounds=(lower, upper)).x
    rest = stamp - peak * _moffat(fit, centres, centres)
    # What the profile leaves is interpolated by its Fourier series, on twice the width against wrapping.
    size = 2 * stamp.shape[0] + 1
    frequency = np.fft.fftfreq(size)
    to_fine = np.exp(2j * np.pi * np.outer(positions, frequency))
    from_own = np.exp(-2j * np.pi * np.outer(frequency, centres))
    series = (to_fine @ from_own).real / size
    fine = peak * _moffat(fit, positions, positions) + series @ rest @ series.T
    return fine / fine.sum()


def finer_psf(psf: np.ndarray, oversampling: int, *, centred: bool = False) -> np.ndarray:
    """Sample PSFs on a finer grid.

    An elliptical Moffat profile, integrated over the pixel, is fitted to each stamp and evaluated at the fine
    pixels; what it leaves is interpolated by its Fourier series. The profile stands for what a PSF that its
    pixels do not sample has beyond their Nyquist frequency, which no interpolation can know.

    Parameters
    ----------
    psf : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Odd-sized stamps of any positive sum; NaN in cells without a PSF.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.
    centred : `bool`, optional
        Whether the stamps are centred on their central pixel. Otherwise they are what the fine pixel sees
        that stands for a pixel: with an even factor, their centre is half a pixel before the central one.

    Returns
    -------
    finer : `numpy.ndarray`, (cell_i, cell_j, K, K)
        Stamps of unit sum, as wide on the sky; NaN where there is no PSF.

    Raises
    ------
    ValueError
        Raised if the factor is not 2 or 3, or the stamps are not odd-sized squares of positive sum.
    """
    check_oversampling(oversampling)
    if psf.ndim != 4 or psf.shape[2] != psf.shape[3] or psf.shape[2] % 2 == 0:
        raise ValueError(f"PSF stamps must be (cell_i, cell_j, k, k) with odd k, not {psf.shape}.")
    size = oversampling * (psf.shape[-1] - 1) + 1
    finer = np.full((*psf.shape[:2], size, size), np.nan)
    last: tuple[np.ndarray, np.ndarray] | None = None
    for index in np.ndindex(psf.shape[:2]):
        stamp = np.asarray(psf[index], dtype=float)
        if not np.isfinite(stamp).all():
            continue
        if last is None or not np.array_equal(last[0], stamp):
            last = stamp, _finer_stamp(stamp, oversampling, 0.0 if centred else _shift(oversampling))
        finer[index] = last[1]
    return finer


def own_stamp(stamp: np.ndarray, oversampling: int) -> np.ndarray:
    """Return the PSF at the pixels of a visit again.

    Parameters
    ----------
    stamp : `numpy.ndarray`, (K, K)
        Stamp of a fine observation, as `finer_psf` makes it.
    oversampling : `int`
        How many fine pixels a pixel has along an axis; with 1 the stamp is returned as it is.

    Returns
    -------
    own : `numpy.ndarray`, (k, k)
        The stamp at the visit's own pixels.
    """
    if oversampling == 1:
        return stamp
    if shift := _shift(oversampling):
        stamp = shift_stamp(stamp, shift, shift)
    first = stamp.shape[0] // 2 % oversampling
    return oversampling**2 * stamp[first::oversampling, first::oversampling]


def finer_layout(layout: CellLayout, oversampling: int) -> CellLayout:
    """Return the same cells in fine pixels.

    Parameters
    ----------
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells in pixels of the visits.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.

    Returns
    -------
    finer : `~lsst.coadd.deepprior.operators.CellLayout`
        The cells in fine pixels.
    """
    check_oversampling(oversampling)
    return dataclasses.replace(layout, height=oversampling * layout.height, width=oversampling * layout.width)


def finer_observation(
    observation: Observation, oversampling: int, psf: np.ndarray | None = None
) -> Observation:
    """Put a visit on a finer grid.

    Parameters
    ----------
    observation : `~lsst.coadd.deepprior.observation.Observation`
        The visit on its own pixels.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.
    psf : `numpy.ndarray`, (cell_i, cell_j, K, K), optional
        Its PSF at the fine pixels that stand for its own, by default that of `finer_psf`.

    Returns
    -------
    finer : `~lsst.coadd.deepprior.observation.Observation`
        The same visit, with one good pixel for each good pixel and its flux in nJy per fine pixel.

    Raises
    ------
    ValueError
        Raised if the factor is not 2 or 3, or the visit is on a finer grid already.
    """
    check_oversampling(oversampling)
    if observation.sampling != 1:
        raise ValueError(f"{observation.name} is on a finer grid already.")
    area = oversampling**2
    shape = tuple(oversampling * n for n in observation.flux.shape)
    first = (oversampling - 1) // 2

    def spaced(image: np.ndarray, scale: float) -> np.ndarray:
        finer = np.zeros(shape, dtype=image.dtype)
        finer[first::oversampling, first::oversampling] = image * image.dtype.type(scale)
        return finer

    return Observation(
        flux=spaced(observation.flux, 1.0 / area),
        variance=spaced(observation.variance, 1.0 / area**2),
        good=spaced(observation.good, True),
        psf=finer_psf(observation.psf, oversampling) if psf is None else psf,
        origin=(oversampling * observation.origin[0], oversampling * observation.origin[1]),
        name=observation.name,
        noise=None if observation.noise is None else spaced(observation.noise, 1.0 / area),
        sampling=oversampling,
    )


def repeated(image: np.ndarray, oversampling: int) -> np.ndarray:
    """Repeat the pixels of an image k x k times, (y, x) to (k y, k x)."""
    return np.repeat(np.repeat(image, oversampling, axis=0), oversampling, axis=1)


def block_correlation(oversampling: int) -> np.ndarray:
    """Return the correlation of white noise whose pixels have been repeated k x k times.

    Parameters
    ----------
    oversampling : `int`
        The factor k.

    Returns
    -------
    correlation : `numpy.ndarray`, (2k - 1, 2k - 1)
        Mean correlation by lag over the positions in a block, 1 in the middle.
    """
    row = 1.0 - np.abs(np.arange(1 - oversampling, oversampling)) / oversampling
    return np.outer(row, row)


def spread_psf(psf: np.ndarray, oversampling: int) -> np.ndarray:
    """Return the PSF of an image whose pixels have been repeated k x k times.

    Parameters
    ----------
    psf : `numpy.ndarray`, (cell_i, cell_j, K, K)
        PSF at the fine pixels that stand for those of the visits, as `finer_psf` makes it.
    oversampling : `int`
        The factor k, 2 or 3.

    Returns
    -------
    spread : `numpy.ndarray`, (cell_i, cell_j, K', K')
        Mean of the image of a point over its positions in a block, centred on the central pixel.
    """
    k, n = oversampling, psf.shape[-1]
    spread = np.zeros((*psf.shape[:2], n + 2 * (k // 2), n + 2 * (k // 2)))
    # The fine pixel that stands for a pixel, number (k - 1) // 2 of its block, gives its value to the others.
    first = k // 2 - (k - 1) // 2
    for dy, dx in np.ndindex(k, k):
        spread[:, :, first + dy : first + dy + n, first + dx : first + dx + n] += psf / k**2
    return np.where(np.isfinite(psf).all(axis=(2, 3), keepdims=True), spread, np.nan)


def spread_layers(layers: CoaddLayers, oversampling: int) -> CoaddLayers:
    """Spread what was found at pixels of visits over all fine pixels of each.

    Parameters
    ----------
    layers : `~lsst.coadd.deepprior.noise.CoaddLayers`
        Coadds of the visits, with one value for each of their pixels, in the unit of a fine pixel, and
        stamps of a fine grid.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.

    Returns
    -------
    spread : `~lsst.coadd.deepprior.noise.CoaddLayers`
        The same on fine pixels. Sums over k x k pixels are those of the visits; the noise of the pixels of
        such a block is the same (`block_correlation`). The PSF is that of such an image, the mean over the
        positions of a source in a block.
    """
    check_oversampling(oversampling)
    k = oversampling

    outliers = []
    for one in layers.outliers:
        rows, columns = (k * axis[:, None, None] for axis in one.pixels)
        rows, columns = np.broadcast_arrays(rows + np.arange(k)[:, None], columns + np.arange(k))
        outliers.append(
            dataclasses.replace(
                one,
                pixels=(rows.ravel(), columns.ravel()),
                x=k * one.x + 0.5 * (k - 1),
                y=k * one.y + 0.5 * (k - 1),
                length=k * one.length,
                width=k * one.width,
                flux=k**2 * one.flux,
                flux_err=k**2 * one.flux_err,
                psf_flux=k**2 * one.psf_flux,
                psf_flux_err=k**2 * one.psf_flux_err,
            )
        )
    return dataclasses.replace(
        layers,
        coadd=repeated(layers.coadd, k),
        residual=repeated(layers.residual, k),
        variance=repeated(layers.variance, k),
        psf=spread_psf(layers.psf, k),
        n_visits=repeated(layers.n_visits, k),
        n_good=repeated(layers.n_good, k),
        masked=repeated(layers.masked, k),
        clipped=repeated(layers.clipped, k),
        outliers=outliers,
    )
