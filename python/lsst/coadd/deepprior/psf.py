# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Point-spread functions: the target, the inner kernel, the kernels that carry the model to the data.

The restored image is ``x = g * s``, the sky convolved with a narrow Gaussian ``g`` (Magain, Courbin & Sohy
1998, ApJ 494, 472): a finite, known PSF keeps the image a legitimate sampling of the sky. The network models
``u >= 0`` with ``x = r * u``, and a visit of PSF ``f`` sees ``f * s = (f / g) * x = k * u`` with ``k = r * (f
/ g)``.
"""

from __future__ import annotations

__all__ = (
    "FWHM_PER_SIGMA",
    "SAMPLED_FWHM",
    "StarFit",
    "carry_kernel",
    "convolve_full",
    "data_kernel",
    "fit_star",
    "fwhm",
    "gaussian_stamp",
    "inner_sigma",
    "shift_stamp",
    "stamp_fault",
    "target_sigma",
)

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
import scipy.fft
import scipy.optimize

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))

SAMPLED_FWHM = 1.8
"""Narrowest Gaussian in pixels (FWHM) that pixels sample, and narrowest target PSF that can be asked for."""

MIN_TARGET_FWHM = 2.0
"""Narrowest default target PSF in pixels (FWHM): a narrower Gaussian is not well sampled."""

_BELOW_BEST = 0.9
"""Largest default target PSF in units of the best seeing: a latent image that is wider than a visit would
have to be sharpened for it."""

_SHARPEST = 0.7
"""Seeing, in units of the target PSF (FWHM), below which the kernels of a visit sharpen so much that maximum
likelihood, whose steps must be short then, does not come near the data."""

_INNER_TO_TARGET = 0.55
"""Sigma of the inner kernel r over that of the target g: the widest r with which ``r * u, u >= 0`` still
holds g at any sub-pixel position to 0.15 % of its peak for a target of 0.8 pixel (0.66 leaves 0.8 %; see
tests/test_psf.py)."""

_REGULARISATION = 1e-3
"""Floor of the transfer function of g, relative to its peak, in the Fourier division by g."""

_LARGEST_SHARE = 0.8
"""Part of its light that a centred Gaussian with a FWHM of 1 pixel has in its central pixel. Division by the
target, of 2 pixels or more, makes nothing but noise of what is sharper."""

_LARGEST_NEGATIVE = 0.5
"""Negative part of a PSF over its positive one that neither noise nor the resampling of an image makes."""

_SMALLEST_PEAK = 1.2
"""Largest pixel of a stamp over the mean of all below which no PSF shows in it."""


def stamp_fault(stamp: np.ndarray) -> str | None:
    """Return why a stamp cannot be that of a PSF.

    Parameters
    ----------
    stamp : `numpy.ndarray`, (k, k)
        The stamp, of any positive sum.

    Returns
    -------
    fault : `str` or `None`
        What is wrong, to be put behind the name of the stamp; `None` where nothing is.
    """
    stamp = np.asarray(stamp, dtype=np.float64)
    if not np.isfinite(stamp).all():
        return "is finite only in part"
    if (total := stamp.sum()) <= 0.0:
        return f"has the sum {total:g}, not positive"
    positive = stamp[stamp > 0.0].sum()
    if positive - total > _LARGEST_NEGATIVE * positive:
        return f"has a negative part of {1.0 - total / positive:.0%} of its positive part; check the PSF"
    if stamp.max() > _LARGEST_SHARE * total:
        return f"has {stamp.max() / total:.0%} of its light in one pixel; a PSF must be at least a pixel wide"
    if stamp.max() * stamp.size < _SMALLEST_PEAK * total:
        return "is flat; check the PSF"
    return None


def _check_stamp(stamp: np.ndarray) -> np.ndarray:
    """Return a stamp as float64 after checking that it is a finite, odd-sized square of positive sum."""
    stamp = np.asarray(stamp, dtype=np.float64)
    if stamp.ndim != 2 or stamp.shape[0] != stamp.shape[1] or stamp.shape[0] % 2 == 0:
        raise ValueError(f"A PSF stamp must be a square with an odd number of pixels, not {stamp.shape}.")
    if not np.all(np.isfinite(stamp)) or stamp.sum() <= 0.0:
        raise ValueError("A PSF stamp must be finite and have a positive sum.")
    return stamp


def gaussian_stamp(sigma: float, size: int | None = None, *, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Sample a round Gaussian at pixel centres.

    Parameters
    ----------
    sigma : `float`
        Standard deviation in pixels.
    size : `int`, optional
        Odd number of pixels on a side; the default reaches to 5 sigma.
    dx, dy : `float`, optional
        Position of the centre relative to the central pixel, in pixels.

    Returns
    -------
    stamp : `numpy.ndarray`, (size, size)
        ``exp(-r^2 / (2 sigma^2))``, unit sum when centred.
    """
    if not sigma > 0.0:
        raise ValueError(f"The sigma of a Gaussian must be positive, not {sigma}.")
    if size is None:
        size = 2 * math.ceil(5.0 * sigma) + 1
    grid = np.arange(size) - size // 2
    centred = np.exp(-0.5 * (grid / sigma) ** 2)
    row = np.exp(-0.5 * ((grid - dx) / sigma) ** 2)
    column = np.exp(-0.5 * ((grid - dy) / sigma) ** 2)
    return np.outer(column, row) / centred.sum() ** 2


def target_sigma(seeing_fwhm: Iterable[float], requested_fwhm: float | None = None) -> float:
    """Return the sigma of the target PSF.

    Parameters
    ----------
    seeing_fwhm : `~collections.abc.Iterable` [`float`]
        FWHM of the visits' PSFs in pixels.
    requested_fwhm : `float`, optional
        FWHM asked for, in pixels; by default half the median seeing, at most nine tenths of the best, and at
        least `MIN_TARGET_FWHM`.

    Returns
    -------
    sigma : `float`
        Standard deviation of the target Gaussian in pixels.

    Raises
    ------
    ValueError
        Raised if the FWHM asked for is below `SAMPLED_FWHM`, or not narrower than the worst seeing; and if
        the best seeing is below `_SHARPEST` of the target PSF.
    """
    seeing = np.asarray(list(seeing_fwhm), dtype=float)
    if requested_fwhm is None:
        fwhm_pixels = max(
            min(0.5 * float(np.median(seeing)), _BELOW_BEST * float(seeing.min())), MIN_TARGET_FWHM
        )
    else:
        fwhm_pixels = float(requested_fwhm)
        if not fwhm_pixels >= SAMPLED_FWHM:
            raise ValueError(
                f"A target PSF with FWHM {fwhm_pixels:.2f} pixels is not sampled by the pixels; "
                f"ask for at least {SAMPLED_FWHM}."
            )
        if fwhm_pixels >= seeing.max():
            raise ValueError(
                f"A target PSF with FWHM {fwhm_pixels:.2f} pixels is not sharper than the worst visit "
                f"({seeing.max():.2f} pixels); ask for a narrower one."
            )
    if seeing.min() < _SHARPEST * fwhm_pixels:
        what = "ask for a narrower target PSF" if requested_fwhm else "restore on finer pixels (oversampling)"
        raise ValueError(
            f"The best seeing, {seeing.min():.2f} pixels, is too sharp for a target PSF with FWHM "
            f"{fwhm_pixels:.2f} pixels; {what}, or leave that visit out."
        )
    return fwhm_pixels / FWHM_PER_SIGMA


def inner_sigma(sigma: float) -> float:
    """Return the sigma in pixels of the inner kernel r that goes with a target of the given sigma."""
    return _INNER_TO_TARGET * sigma


@functools.lru_cache(maxsize=32)
def _gaussian_transfer(sigma: float, size: int) -> np.ndarray:
    """Fourier transform of `gaussian_stamp` with its central pixel as origin, on a grid of some size."""
    stamp = gaussian_stamp(sigma)
    padded = np.zeros((size, size))
    half = stamp.shape[0] // 2
    padded[: stamp.shape[0], : stamp.shape[1]] = stamp
    return scipy.fft.rfft2(np.roll(padded, (-half, -half), axis=(0, 1)))


def _divide_by_target(psfs: np.ndarray, sigma: float, numerator_sigma: float | None) -> np.ndarray:
    """Fourier division of stamps by g, times a Gaussian in the numerator if asked for."""
    psfs = np.asarray(psfs, dtype=np.float64)
    k = psfs.shape[-1]
    for stamp in psfs.reshape(-1, *psfs.shape[-2:]):
        _check_stamp(stamp)
    # The stamps' central pixel stays at (k // 2, k // 2), so that the quotient is centred there too. Small
    # stamps may be narrower than g.
    size = scipy.fft.next_fast_len(k + max(k + 1, len(gaussian_stamp(sigma))), real=True)
    g = _gaussian_transfer(sigma, size)
    factor = np.conj(g) / (np.abs(g) ** 2 + _REGULARISATION**2)
    if numerator_sigma is not None:
        factor = factor * _gaussian_transfer(numerator_sigma, size)
    kernels = scipy.fft.irfft2(scipy.fft.rfft2(psfs, s=(size, size)) * factor, s=(size, size))[..., :k, :k]
    return kernels / kernels.sum(axis=(-2, -1), keepdims=True)


def data_kernel(psf: np.ndarray, sigma: float) -> np.ndarray:
    """Compute the kernels ``k = r * (f / g)`` that carry the latent image u to a visit.

    ``f / g`` is the regularised Fourier division of the discrete stamps, ``F G* / (|G|^2 + e^2)``.

    Parameters
    ----------
    psf : `numpy.ndarray`, (..., k, k)
        PSF f of the visit: odd-sized stamps, any positive sum.
    sigma : `float`
        Sigma of the target g in pixels.

    Returns
    -------
    kernel : `numpy.ndarray`, (..., k, k)
        Unit sum.

    Raises
    ------
    ValueError
        Raised if the stamp is not an odd-sized, finite square of positive sum.
    """
    return _divide_by_target(psf, sigma, inner_sigma(sigma))


def carry_kernel(psf: np.ndarray, sigma: float) -> np.ndarray:
    """Compute the kernels ``f / g`` that carry the restored image x to an image of PSF f.

    Parameters, return value and errors are those of `data_kernel`.
    """
    return _divide_by_target(psf, sigma, None)


def convolve_full(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve two images by FFT, as `scipy.signal.fftconvolve` does, whose import takes half a second.

    Parameters
    ----------
    image, kernel : `numpy.ndarray`, (y, x)
        Finite images.

    Returns
    -------
    full : `numpy.ndarray`, (y, x)
        All pixels to which they contribute: the sum of both shapes less one.
    """
    shape = [n + k - 1 for n, k in zip(image.shape, kernel.shape, strict=True)]
    size = [scipy.fft.next_fast_len(n, real=True) for n in shape]
    product = scipy.fft.rfft2(image, size) * scipy.fft.rfft2(kernel, size)
    return scipy.fft.irfft2(product, size)[: shape[0], : shape[1]]


def shift_stamp(stamp: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """Shift a well-sampled stamp by a fraction of a pixel with a Fourier phase.

    Parameters
    ----------
    stamp : `numpy.ndarray`, (k, k)
        Odd-sized stamp.
    dx, dy : `float`
        Shift in pixels; positive values move the centre to larger x and y.

    Returns
    -------
    shifted : `numpy.ndarray`, (k, k)
        The same sum up to what leaves the stamp.
    """
    stamp = _check_stamp(stamp)
    k = stamp.shape[0]
    size = scipy.fft.next_fast_len(2 * k, real=True)
    phase_y = np.exp(-2j * np.pi * dy * scipy.fft.fftfreq(size))
    phase_x = np.exp(-2j * np.pi * dx * scipy.fft.rfftfreq(size))
    phase = np.outer(phase_y, phase_x)
    return scipy.fft.irfft2(scipy.fft.rfft2(stamp, s=(size, size)) * phase, s=(size, size))[:k, :k]


_WIDEST = 1e4
"""Sigma in pixels above which a fitted Gaussian is taken as infinitely wide."""

_LOG_SHARPEST = 30.0
"""Logarithm of the inverse of the smallest sigma in pixels, which a single bright pixel may have."""


@dataclasses.dataclass(frozen=True)
class StarFit:
    """Elliptical Gaussian fitted to the image of a star; ``sigma`` is the geometric mean of the two axes."""

    flux: float
    x: float
    y: float
    sigma: float
    e1: float
    e2: float


def fit_star(
    image: np.ndarray, *, x: float | None = None, y: float | None = None, radius: int = 6
) -> StarFit:
    """Fit an elliptical Gaussian, sampled at pixel centres, to a star by least squares.

    This is what "size" means throughout: the sigma of this fit to a star, compared with that of the same fit
    to the advertised PSF stamp.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Image without background.
    x, y : `float`, optional
        First guess of the position; the default is the centre of the image.
    radius : `int`, optional
        Half the side of the box of pixels fitted.

    Returns
    -------
    fit : `StarFit`
        Flux, position, geometric-mean sigma and ellipticity ``e1 = (ixx - iyy) / (ixx + iyy)``, ``e2 = 2 ixy
        / (ixx + iyy)``. Where there is no star, the Gaussian may grow without end: its sigma is then
        infinite, and flux and ellipticity are NaN.

    Raises
    ------
    ValueError
        Raised if the box is not inside the image or has pixels that are not finite.
    """
    ny, nx = image.shape
    x = (nx - 1) / 2 if x is None else x
    y = (ny - 1) / 2 if y is None else y
    ix, iy = round(x), round(y)
    if not (radius <= ix < nx - radius and radius <= iy < ny - radius):
        raise ValueError(
            f"A box of radius {radius} at ({x:.1f}, {y:.1f}) is not inside an image of shape {image.shape}."
        )
    box = np.asarray(image[iy - radius : iy + radius + 1, ix - radius : ix + radius + 1], dtype=float)
    if not np.all(np.isfinite(box)):
        raise ValueError(f"The star at ({x:.1f}, {y:.1f}) has pixels that are not finite.")
    grid_y, grid_x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    scale = max(float(box.max()), 1e-30)

    def residual(p: np.ndarray) -> np.ndarray:
        amplitude, x0, y0, log_a, log_b, c = p
        # Inverse covariance as L L^T with L = [[a, 0], [c, b]]: always positive definite.
        u = np.exp(log_a) * (grid_x - x0) + c * (grid_y - y0)
        v = np.exp(log_b) * (grid_y - y0)
        return (amplitude * np.exp(-0.5 * (u * u + v * v)) - box / scale).ravel()

    start = np.array([1.0, x - ix, y - iy, -0.2, -0.2, 0.0])
    amplitude, x0, y0, log_a, log_b, c = scipy.optimize.least_squares(residual, start, method="lm").x
    a, b = (math.exp(min(float(log), _LOG_SHARPEST)) for log in (log_a, log_b))
    if min(a, b) * _WIDEST < 1.0:
        return StarFit(flux=math.nan, x=ix + x0, y=iy + y0, sigma=math.inf, e1=math.nan, e2=math.nan)
    ixx = 1.0 / a**2 + (c / (a * b)) ** 2
    iyy = 1.0 / b**2
    ixy = -c / (a * b**2)
    determinant = max(ixx * iyy - ixy**2, 1e-30)
    return StarFit(
        flux=2.0 * math.pi * math.sqrt(determinant) * amplitude * scale,
        x=ix + x0,
        y=iy + y0,
        sigma=determinant**0.25,
        e1=(ixx - iyy) / (ixx + iyy),
        e2=2.0 * ixy / (ixx + iyy),
    )


def fwhm(psf: np.ndarray) -> float:
    """Return the FWHM in pixels of the Gaussian fitted to a PSF stamp.

    Raises
    ------
    ValueError
        Raised if the stamp is none of a PSF, or so flat that no Gaussian fits.
    """
    psf = _check_stamp(psf)
    half = psf.shape[0] // 2
    rough = math.sqrt(psf.sum() / (2.0 * math.pi * psf.max()))
    sigma = fit_star(psf, radius=min(half, max(3, math.ceil(2.5 * rough)))).sigma
    if not math.isfinite(sigma):
        raise ValueError("No Gaussian fits the PSF stamp, which is flat; check the PSF.")
    return FWHM_PER_SIGMA * sigma
