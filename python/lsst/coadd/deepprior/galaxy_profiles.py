# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Sérsic profiles of galaxies as a coadd shows them."""

from __future__ import annotations

__all__ = ("MAX_INDEX", "MIN_INDEX", "GalaxyShape", "galaxy_stamp")

import functools
import math
from typing import NamedTuple

import galsim
import numpy as np
import scipy.fft
import scipy.interpolate

MIN_INDEX, MAX_INDEX = 0.5, 5.0
"""Range of Sérsic indices: from a Gaussian to beyond de Vaucouleurs' law."""

_INDICES = np.geomspace(MIN_INDEX, MAX_INDEX, 12)
_WAVE_NUMBERS = np.concatenate([[0.0], np.geomspace(0.01, 60.0, 160)])
"""Nodes of the table of transforms; wave numbers are in radians per half-light radius."""

_FINE = np.linspace(0.0, math.log1p(4.0 * _WAVE_NUMBERS[-1]), 1000)
"""Logarithms of 1 + 4 wave numbers between which a transform is interpolated linearly."""


_WINGS = 8.0
"""Half-light radii beyond a stamp of which nothing is seen in it: periodic repetitions are that far away."""


class GalaxyShape(NamedTuple):
    r"""Shape of a galaxy of concentric elliptical isophotes.

    Parameters
    ----------
    log_radius : `float`
        Logarithm of the half-light radius in pixels, the geometric mean of its half axes.
    e1, e2 : `float`
        Half the logarithm of the axis ratio a/b, times the cosine and sine of twice the position angle of the
        major axis from x to y: unlike an axis ratio they have no limits and are smooth at roundness.
    log_index : `float`
        Logarithm of the Sérsic index n.
    """

    log_radius: float
    e1: float
    e2: float
    log_index: float


@functools.cache
def _transforms() -> scipy.interpolate.RectBivariateSpline:
    """Tabulate the Fourier transform of Sérsic profiles, by logarithm of the index and of 1 + wave number."""
    table = [
        [galsim.Sersic(n=n, half_light_radius=1.0).kValue(k, 0.0).real for k in _WAVE_NUMBERS]
        for n in _INDICES
    ]
    return scipy.interpolate.RectBivariateSpline(np.log(_INDICES), np.log1p(4.0 * _WAVE_NUMBERS), table)


@functools.lru_cache(maxsize=64)
def _transform(log_index: float) -> np.ndarray:
    """Return the Fourier transform of the Sérsic profile of some index at `_FINE`."""
    return _transforms()(log_index, _FINE)[0]


def galaxy_stamp(psf: np.ndarray, shape: GalaxyShape, dy: float, dx: float, size: int) -> np.ndarray:
    r"""Draw a galaxy of unit flux at the PSF of a coadd.

    The transform of a Sérsic profile, which falls with the radius as :math:`\exp(-b_n (r / r_e)^{1/n})`
    (Sérsic 1968; Graham & Driver 2005, PASA 22, 118), is multiplied with that of the PSF.

    Parameters
    ----------
    psf : `numpy.ndarray`, (k, k)
        PSF stamp of unit sum and odd size, which includes the response of the pixel.
    shape : `GalaxyShape`
        Shape of the galaxy.
    dy, dx : `float`
        Offset in pixels of its centre from the centre of the stamp.
    size : `int`
        Height and width of the result in pixels, odd.

    Returns
    -------
    stamp : `numpy.ndarray`, (size, size)
        The galaxy; what lies outside of the stamp is lost.

    Raises
    ------
    ValueError
        Raised if a size is even, or the result is smaller than the PSF.
    """
    k = psf.shape[0]
    if psf.shape != (k, k) or k % 2 == 0 or size % 2 == 0 or size < k:
        raise ValueError(
            f"The PSF must be square and odd, and the stamp odd and not smaller, not {psf.shape} and {size}."
        )
    radius = np.exp(shape.log_radius)
    # Light that leaves the stamp on one side must not enter it on the other.
    wide = scipy.fft.next_fast_len(size + k + math.ceil(_WINGS * radius), real=True)
    ky, kx = (2.0 * np.pi * f for f in (scipy.fft.fftfreq(wide)[:, None], scipy.fft.rfftfreq(wide)))
    stretch = np.hypot(shape.e1, shape.e2)
    sinc = np.sinh(stretch) / stretch if stretch > 1e-8 else 1.0
    # The matrix exponential of [[e1, e2], [e2, -e1]] acts on (x, y).
    xx, yy, xy = np.cosh(stretch) + sinc * shape.e1, np.cosh(stretch) - sinc * shape.e1, sinc * shape.e2
    wave = np.minimum(radius * np.hypot(xx * kx + xy * ky, xy * kx + yy * ky), _WAVE_NUMBERS[-1])
    profile = np.interp(np.log1p(4.0 * wave), _FINE, _transform(float(shape.log_index)))
    shift = (size - k) // 2
    phase = np.exp(-1j * ky * (dy + shift)) * np.exp(-1j * kx * (dx + shift))
    drawn = scipy.fft.irfft2(scipy.fft.rfft2(psf, (wide, wide)) * profile * phase, (wide, wide))
    return drawn[:size, :size]
