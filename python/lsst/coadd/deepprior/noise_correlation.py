# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The correlation of noise between pixels, which no variance plane tells: measured, averaged and drawn anew.

Resampling makes the noise of neighbouring pixels correlated (`~lsst.coadd.deepprior.resampling`), so that the
sum over the pixels of a source is noisier than the variances say. The noise is taken to be stationary once it
is divided by its standard deviation.
"""

from __future__ import annotations

__all__ = ("REACH", "correlated_noise", "noise_correlation", "visit_correlations")


import numpy as np
import scipy.fft
import scipy.ndimage
import torch

from .operators import CellConvolution
from .outliers import OUTLIER_PSF_ERROR, find_outliers
from .patch_data import PatchData

REACH = 5
"""Largest lag in pixels of a visit along an axis; a Lanczos kernel of order 3, the widest in use, correlates
no more."""

_SIGNIFICANT = 3.0
"""Correlations below this number of standard errors, ``n^(-1/2)`` for n pairs, are taken as 0: the sum over
120 lags would otherwise be noisier than it is wrong."""

_SKY = 1.0
"""Largest model, in units of the noise of the visit, of pixels that count as sky."""

_CLAIMED = 4.0
"""Significance of the model under the PSF from which it is light: below, it may be the noise of the visits,
and what such a model leaves of them lacks the noise of the scale of the PSF."""

_OUTLIER_REACH = 10
"""Distance in pixels of a visit from an outlier up to which nothing counts as sky: the wings of a trail, too
faint to be seen, would make the noise look correlated."""


def noise_correlation(deviation: np.ndarray, where: np.ndarray, reach: int = REACH) -> np.ndarray:
    """Measure the correlation of noise.

    Parameters
    ----------
    deviation : `numpy.ndarray`, (y, x)
        Noise in units of its standard deviation.
    where : `numpy.ndarray`, (y, x), bool
        Pixels to use, in which ``deviation`` is finite.
    reach : `int`, optional
        Largest lag along an axis.

    Returns
    -------
    correlation : `numpy.ndarray`, (k, k)
        Correlation at the lags from -``reach`` to ``reach`` along y and x, 1 in the middle; that of white
        noise where no pixel can be used.

    Raises
    ------
    ValueError
        Raised if the shapes differ or a pixel to use is not finite.
    """
    if deviation.shape != where.shape:
        raise ValueError(f"The noise is {deviation.shape} and its mask {where.shape}; they must be equal.")
    if not np.isfinite(deviation[where]).all():
        raise ValueError("A pixel of the noise is not finite; leave it out of the mask.")
    white = np.zeros((2 * reach + 1, 2 * reach + 1))
    white[reach, reach] = 1.0
    size = [scipy.fft.next_fast_len(n + reach, real=True) for n in where.shape]

    def lags(image: np.ndarray) -> np.ndarray:
        power = np.abs(scipy.fft.rfft2(image, size)) ** 2
        wrapped = scipy.fft.irfft2(power, size)
        steps = np.arange(-reach, reach + 1)
        return wrapped[np.ix_(steps, steps)]

    mask = where.astype(float)
    n_pairs = np.maximum(np.rint(lags(mask)), 1.0)
    covariance = lags(np.where(where, deviation, 0.0)) / n_pairs
    if not covariance[reach, reach] > 0.0:
        return white
    correlation = covariance / covariance[reach, reach]
    significant = np.abs(correlation) > _SIGNIFICANT / np.sqrt(n_pairs)
    return np.where(significant | (white > 0.0), correlation, 0.0)


def correlated_noise(shape: tuple[int, int], correlation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw Gaussian noise of unit variance and some correlation.

    White noise is filtered by the root of its power spectrum, the Fourier transform of the correlation
    (Wiener-Khinchin theorem).

    Parameters
    ----------
    shape : `tuple` [`int`, `int`]
        Height and width in pixels.
    correlation : `numpy.ndarray`, (k, k)
        Correlation by lag (see `noise_correlation`).
    rng : `numpy.random.Generator`
        Source of random numbers.

    Returns
    -------
    noise : `numpy.ndarray`, (y, x), float32
        The noise.

    Raises
    ------
    ValueError
        Raised if the correlation is not square, of odd size, with 1 in the middle.
    """
    half = correlation.shape[0] // 2
    if correlation.shape != (2 * half + 1, 2 * half + 1) or correlation[half, half] != 1.0:
        raise ValueError(
            f"A correlation is square, odd and 1 in the middle; this one is {correlation.shape}."
        )
    if np.count_nonzero(correlation) == 1:
        return rng.standard_normal(shape, dtype=np.float32)
    size = tuple(scipy.fft.next_fast_len(n + 2 * half, real=True) for n in shape)
    kernel = np.zeros(size)
    steps = np.arange(-half, half + 1)
    kernel[np.ix_(steps, steps)] = correlation
    power = np.maximum(scipy.fft.rfft2(kernel).real, 0.0)
    noise = scipy.fft.irfft2(scipy.fft.rfft2(rng.standard_normal(size)) * np.sqrt(power), size)
    return noise[: shape[0], : shape[1]].astype(np.float32)


def visit_correlations(data: PatchData, latent: torch.Tensor) -> np.ndarray:
    """Measure the correlation of the noise of each visit.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits. The image of noise alone, where one has it, is measured in place of the sky.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy, whose significant light is subtracted from the visits.

    Returns
    -------
    correlations : `numpy.ndarray`, (visit, k, k)
        See `noise_correlation`; that of white noise for visits without a good pixel. On a finer grid the lags
        are in its pixels, and only those of the visits' pixels have a correlation.
    """
    step, first = data.sampling, (data.sampling - 1) // 2
    reach = step * REACH
    result = np.zeros((len(data), 2 * reach + 1, 2 * reach + 1))
    result[:, reach, reach] = 1.0
    latent = _claimed(data, latent)
    for index, observation, visit in data.read():
        found = result[index, ::step, ::step]
        if observation.noise is not None:
            own, variance, good = (
                image[first::step, first::step]
                for image in (observation.noise, observation.variance, observation.good)
            )
            where = good & np.isfinite(own)
            sigma = np.sqrt(np.where(where, variance, 1.0))
            found[...] = noise_correlation(np.where(where, own, 0.0) / sigma, where)
            continue
        prediction = visit.kernel.forward(latent)
        residual, scale, noise, weight, prediction = (
            image[data.sampled]
            for image in (
                visit.flux - prediction,
                data.scale(visit, prediction, OUTLIER_PSF_ERROR),
                visit.variance.sqrt(),
                visit.weight,
                prediction,
            )
        )
        outliers = find_outliers(residual, scale, weight > 0)
        near = scipy.ndimage.maximum_filter(outliers.cpu().numpy(), 2 * _OUTLIER_REACH + 1)
        where = ((weight > 0) & (prediction < _SKY * noise)).cpu().numpy() & ~near
        values = (residual / noise).cpu().numpy().astype(float)
        if where.any():
            found[...] = noise_correlation(values - values[where].mean(), where)
    return result


def _claimed(data: PatchData, latent: torch.Tensor) -> torch.Tensor:
    """Return the light of a latent image that is significant under the PSF, (y, x), in nJy."""
    light = CellConvolution(data.gram_kernel(), data.layout, data.margin).forward(latent)
    noise = data.matched_noise()
    significance = torch.where(noise > 0.0, light / noise, torch.inf)
    return torch.where(significance > _CLAIMED, latent, 0.0)
