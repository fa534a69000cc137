# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Errors of fluxes from sources that are too faint to be found (confusion; Condon 1974, ApJ 188, 279).

Unseen sources, strewn at random, give an image the covariance :math:`\kappa P P^T`, with P the PSF and
:math:`\kappa = n \langle f^2 \rangle`, their number a pixel times their mean squared flux. A flux that is
the sum of the data times weights w then errs by

.. math:: \sigma^2 = \kappa \sum_p (P^T w)_p^2 .

A wide galaxy reaches more of them than a star. Kappa is what the fluxes of point sources at blank places
scatter by more than the noise does.
"""

from __future__ import annotations

__all__ = ("confusion_error", "unseen_light")

import math

import numpy as np
import scipy.ndimage

from .plain_coadd import Coadd
from .psf import convolve_full

_BLANK = 2.0
"""Distance in FWHM of the PSF along each axis from all sources, and from the border, of places that are
blank."""

_PLACES = 100.0
"""Least number of independent blank places that a scatter is measured on, to a tenth."""

_CORE = (15.87, 84.13)
"""Percentiles a standard deviation around the median. What is further out is no crowd of unseen sources, but
single things: a trail that was not masked, or the rest of a bright star."""


def unseen_light(left: np.ndarray, y: np.ndarray, x: np.ndarray, coadd: Coadd) -> float:
    """Measure the light of sources too faint to be found.

    Parameters
    ----------
    left : `numpy.ndarray`, (y, x)
        Data minus all sources and the sky, in nJy.
    y, x : `numpy.ndarray`, (source,)
        Positions of the sources in the array of the patch.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Data and noise.

    Returns
    -------
    light : `float`
        Number of unseen sources a pixel times their mean squared flux, in nJy^2; 0 where blank places do not
        scatter by more than the noise, or are too few to tell.
    """
    if not coadd.good.any():
        return 0.0
    near = np.zeros(coadd.shape, dtype=bool)
    inside = [np.clip(np.rint(c).astype(int), 0, n - 1) for c, n in zip((y, x), coadd.shape, strict=True)]
    near[tuple(inside)] = True
    size = 2 * math.ceil(_BLANK * float(np.nanmedian(coadd.fwhm))) + 1
    near = scipy.ndimage.maximum_filter(near, size, mode="constant", cval=True)
    blank = coadd.good & ~near & (coadd.information > 0.0)
    psf = coadd.psf_at(0.5 * coadd.shape[0], 0.5 * coadd.shape[1])
    # How a point source shows in the flux of one at a distance.
    overlap = convolve_full(psf, psf[::-1, ::-1]) / (psf**2).sum()
    area = float((overlap**2).sum())
    if blank.sum() < _PLACES * area:
        return 0.0
    flux = coadd.correlate(coadd.weight * left, power=1)[blank] / coadd.matched[blank]
    low, high = np.percentile(flux * np.sqrt(coadd.information[blank]), _CORE)
    excess = max((0.5 * (high - low)) ** 2 - 1.0, 0.0)
    return excess / (area * float(np.median(coadd.information[blank])))


def confusion_error(weights: np.ndarray, psf: np.ndarray, light: float) -> float:
    """Return the error of a flux from sources too faint to be found.

    Parameters
    ----------
    weights : `numpy.ndarray`, (y, x)
        Weights of the pixels whose sum is the flux.
    psf : `numpy.ndarray`, (k, k)
        PSF of the data.
    light : `float`
        What `unseen_light` returns, in nJy^2.

    Returns
    -------
    error : `float`
        Standard error in nJy.
    """
    return math.sqrt(light * float((convolve_full(weights, psf[::-1, ::-1]) ** 2).sum()))
