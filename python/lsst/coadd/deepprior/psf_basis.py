# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Small signed corrections of point-spread functions, in a basis that the sky cannot tell from itself.

A PSF f is corrected by a convolution, :math:`f \leftarrow f + \sum_j a_j D_j * f`, with :math:`D_j` the
derivatives of Gaussians of some widths. Derivatives of second and higher order have no sum and no first
moment, so that the unit sum and the centroid of f stay. What a visit then sees of any sky changes by
:math:`\sum_j a_j D_j * p`, with p what it was predicted to see: neither the sky nor f itself is needed. A
correction that all visits share is, for the same reason, a change of the sky, which only sources of known
shape can exclude.
"""

from __future__ import annotations

__all__ = (
    "BACKGROUND",
    "FLUX",
    "NOTHING",
    "SHIFT_X",
    "SHIFT_Y",
    "PsfBasis",
    "blind_stamps",
    "corrected_stamps",
    "moffat_stamp",
    "reference_sigma",
    "stamp_changes",
)

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import scipy.fft

from .psf import FWHM_PER_SIGMA, fwhm, shift_stamp

FLUX, SHIFT_X, SHIFT_Y, BACKGROUND = range(4)
"""Places of the first parameters of a visit, which are no change of its PSF."""

_N_OTHERS = 4

_WIDTHS = (0.4, 1.0, 2.0)
"""Sigma of the Gaussians whose second derivatives change the PSF, over that of the reference."""

_FINE = 0.6
"""The same for derivatives of third and fourth order."""

_MOFFAT_BETA = 3.0
"""Exponent of the Moffat profile that a PSF starts from where none is given; 2.5 to 4 is seen in practice."""

NOTHING = 1e-5
"""Width of the prior of a parameter that is not fitted."""

_CENTRING_PASSES = 3


@dataclasses.dataclass(frozen=True)
class _Mode:
    """Derivatives of a Gaussian: terms (factor, order in x, order in y), and its sigma over the reference."""

    terms: tuple[tuple[float, int, int], ...]
    width: float


def _second(width: float) -> list[_Mode]:
    """Size, and the two components of the ellipticity."""
    return [
        _Mode(((0.5, 2, 0), (0.5, 0, 2)), width),
        _Mode(((0.5, 2, 0), (-0.5, 0, 2)), width),
        _Mode(((1.0, 1, 1),), width),
    ]


_MODES = (
    *(mode for width in _WIDTHS for mode in _second(width)),
    *(_Mode(((1.0 / 6.0, p, 3 - p),), _FINE) for p in range(4)),
    _Mode(((1.0 / 24.0, 4, 0), (1.0 / 12.0, 2, 2), (1.0 / 24.0, 0, 4)), _FINE),
    _Mode(((1.0 / 24.0, 4, 0), (-1.0 / 24.0, 0, 4)), _FINE),
    _Mode(((1.0 / 12.0, 3, 1), (1.0 / 12.0, 1, 3)), _FINE),
)


class PsfBasis:
    """The parameters by which a visit may differ from what is said of it.

    The first are its flux scale, its shift in x and y and its background (see `FLUX` and so on); the others
    change the PSF. A size parameter is the relative change of the second moments of a PSF as wide as the
    reference, an ellipticity parameter that of ``(ixx - iyy) / (ixx + iyy)`` or ``2 ixy / (ixx + iyy)``.

    Parameters
    ----------
    sigma : `float`
        Sigma in pixels of the reference, a Gaussian about as wide as the sharpest of the PSFs.
    """

    def __init__(self, sigma: float) -> None:
        if not sigma > 0.0:
            raise ValueError(f"The sigma of the reference must be positive, not {sigma}.")
        self.sigma = sigma
        self.n_modes = len(_MODES)
        self.n_parameters = _N_OTHERS + self.n_modes

    @property
    def shape(self) -> slice:
        """The parameters that change the PSF."""
        return slice(_N_OTHERS, _N_OTHERS + self.n_modes)

    @property
    def moments(self) -> list[int]:
        """The parameters of size and ellipticity of the least width."""
        return [_N_OTHERS + mode for mode in range(3)]

    def transfer(self, shape: tuple[int, int], dtype: npt.DTypeLike = np.complex128) -> np.ndarray:
        """Return the Fourier transforms of flux, shifts and modes on a grid.

        Parameters
        ----------
        shape : `tuple` [`int`, `int`]
            Shape (y, x) of the grid in pixels.
        dtype : `numpy.typing.DTypeLike`, optional
            Complex type of the result; each transform is computed in double precision.

        Returns
        -------
        transfer : `numpy.ndarray`, (3 + n_modes, y, x // 2 + 1)
            To be multiplied with the output of a real Fourier transform.
        """
        wy = 2.0 * np.pi * scipy.fft.fftfreq(shape[0])[:, None]
        wx = 2.0 * np.pi * scipy.fft.rfftfreq(shape[1])[None, :]
        # A pixel of odd derivatives at the highest frequency has no sign.
        iy = 1j * np.where(np.abs(wy) < np.pi, wy, 0.0)
        ix = 1j * np.where(np.abs(wx) < np.pi, wx, 0.0)
        result = np.empty((SHIFT_Y + 1 + self.n_modes, shape[0], shape[1] // 2 + 1), dtype=dtype)
        result[FLUX], result[SHIFT_X], result[SHIFT_Y] = 1.0, -ix, -iy
        for transform, mode in zip(result[SHIFT_Y + 1 :], _MODES, strict=True):
            smooth = np.exp(-0.5 * (mode.width * self.sigma) ** 2 * (wx**2 + wy**2))
            derivative = sum(
                factor * (-self.sigma * ix) ** p * (-self.sigma * iy) ** q for factor, p, q in mode.terms
            )
            transform[...] = derivative * smooth
        return result

    def prior(self, blind: bool, anchored: bool) -> np.ndarray:
        """Return the standard deviations that the parameters start with, (parameter,); 0 for the background.

        Parameters
        ----------
        blind : `bool`
            Whether the PSFs are guesses.
        anchored : `bool`
            Whether there are stars; other light tells no more than size and ellipticity.

        Returns
        -------
        widths : `numpy.ndarray`, (parameter,)
            Standard deviations.
        """
        second, higher = (0.5, 0.3) if blind else (0.1, 0.1)
        widths = np.full(self.n_parameters, higher)
        widths[:_N_OTHERS] = (0.05, 0.2, 0.2, 0.0)
        widths[_N_OTHERS : _N_OTHERS + 3 * len(_WIDTHS)] = second
        if not anchored:
            widths[_N_OTHERS:] = NOTHING
            widths[self.moments] = second
        return widths


def moffat_stamp(fwhm_pixels: float, size: int) -> np.ndarray:
    """Return a round Moffat profile, sampled at pixel centres, of unit sum.

    Parameters
    ----------
    fwhm_pixels : `float`
        FWHM in pixels.
    size : `int`
        Odd number of pixels on a side.

    Returns
    -------
    stamp : `numpy.ndarray`, (size, size)
        The profile.
    """
    if not fwhm_pixels > 0.0 or size % 2 == 0:
        raise ValueError(f"A profile of FWHM {fwhm_pixels} on {size} pixels needs a FWHM and an odd size.")
    y, x = np.mgrid[:size, :size] - size // 2
    scale = 0.5 * fwhm_pixels / math.sqrt(2.0 ** (1.0 / _MOFFAT_BETA) - 1.0)
    stamp = (1.0 + (x**2 + y**2) / scale**2) ** -_MOFFAT_BETA
    return stamp / stamp.sum()


def stamp_changes(stamp: np.ndarray, basis: PsfBasis) -> np.ndarray:
    """Return what a unit of each mode adds to a PSF stamp.

    Parameters
    ----------
    stamp : `numpy.ndarray`, (k, k)
        The stamp.
    basis : `PsfBasis`
        The modes.

    Returns
    -------
    changes : `numpy.ndarray`, (n_modes, k, k)
        Without sum and first moment, up to what leaves the stamp.
    """
    k = stamp.shape[0]
    size = scipy.fft.next_fast_len(2 * k, real=True)
    spectrum = scipy.fft.rfft2(stamp, s=(size, size)) * basis.transfer((size, size))[3:]
    return scipy.fft.irfft2(spectrum, s=(size, size))[:, :k, :k]


def corrected_stamps(stamps: np.ndarray, basis: PsfBasis, coefficients: np.ndarray) -> np.ndarray:
    """Correct PSF stamps: unit sum and centroid stay, and no pixel is negative that was not before.

    Parameters
    ----------
    stamps : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Stamps of unit sum, NaN in cells without a PSF.
    basis : `PsfBasis`
        The modes.
    coefficients : `numpy.ndarray`, (n_modes,)
        Their coefficients, one correction for all cells.

    Returns
    -------
    corrected : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Corrected stamps, NaN where ``stamps`` is.
    """
    if not coefficients.any():
        return stamps
    result = np.full(stamps.shape, np.nan)
    done: dict[bytes, np.ndarray] = {}
    for cell in np.ndindex(stamps.shape[:2]):
        stamp = np.asarray(stamps[cell], dtype=float)
        if not np.isfinite(stamp).all():
            continue
        key = stamp.tobytes()
        if key not in done:
            change = np.tensordot(coefficients, stamp_changes(stamp, basis), axes=1)
            done[key] = _projected(stamp + change, stamp)
        result[cell] = done[key]
    return result


def _projected(stamp: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the non-negative stamp of unit sum next to a stamp, with the centroid that it had before."""
    wanted = _centroid(before)
    for _ in range(_CENTRING_PASSES):
        stamp = np.maximum(stamp, np.minimum(before, 0.0))
        stamp = stamp / stamp.sum()
        dx, dy = (a - b for a, b in zip(wanted, _centroid(stamp), strict=True))
        if math.hypot(dx, dy) < 1e-4:
            break
        stamp = shift_stamp(stamp, dx, dy)
    stamp = np.maximum(stamp, np.minimum(before, 0.0))
    return stamp / stamp.sum()


def _centroid(stamp: np.ndarray) -> tuple[float, float]:
    """Return the first moments x and y of a stamp of any sum, in pixels from its corner."""
    grid = np.arange(stamp.shape[0])
    total = stamp.sum()
    return float(stamp.sum(axis=0) @ grid / total), float(stamp.sum(axis=1) @ grid / total)


def blind_stamps(stamps: np.ndarray) -> np.ndarray:
    """Replace PSF stamps by round profiles that keep only the median FWHM of those of a visit.

    Parameters
    ----------
    stamps : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Stamps, NaN in cells without a PSF.

    Returns
    -------
    guesses : `numpy.ndarray`, (cell_i, cell_j, k, k)
        Moffat profiles of one FWHM, NaN where ``stamps`` is.
    """
    has_psf = np.isfinite(stamps).all(axis=(2, 3))
    if not has_psf.any():
        return stamps
    wanted, size = float(np.median([fwhm(stamp) for stamp in stamps[has_psf]])), stamps.shape[-1]
    # The Gaussian fitted to a Moffat profile is wider than its FWHM.
    width = wanted
    for _ in range(3):
        width *= wanted / fwhm(moffat_stamp(width, size))
    return np.where(has_psf[:, :, None, None], moffat_stamp(width, size), np.nan)


def reference_sigma(seeing: np.ndarray) -> float:
    """Return the sigma in pixels of the Gaussian of the least of some FWHM in pixels.

    A correction is as smooth as the PSF and a mode together, so that modes as wide as a typical PSF could not
    make a sharp one sharper.
    """
    return float(np.min(seeing)) / FWHM_PER_SIGMA
