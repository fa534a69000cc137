# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Total fluxes of the sources of a restored patch, with templates that do not fit the noise."""

from __future__ import annotations

__all__ = ("SYSTEMATIC_FLOOR", "TotalFluxes", "total_fluxes")

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.ndimage

from .joint_fit import Coadd, JointFit, Stamp

SYSTEMATIC_FLOOR = 0.005
"""Relative error of fluxes from the flux scale and the PSF models, which no simulation of ours has: half of
what Rubin requires of the flux scale (LSST Science Requirements Document, LPM-17, 10 mmag)."""

_EXTENDED = 3.0
"""Significance of the width beyond that of the PSF from which a source is extended."""

_SHAPE_SNR = 20.0
"""S/N below which the shape of a source on the restored image is too noisy to be its template."""

_MAX_WIDTH = 0.55
"""Largest sigma, in units of the FWHM of the coadd PSF, of the profile of a source below `_SHAPE_SNR`."""

_PASSES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class TotalFluxes:
    """Result of `total_fluxes`.

    Parameters
    ----------
    flux : `numpy.ndarray`, (source,)
        Fluxes in nJy.
    error : `numpy.ndarray`, (source,)
        Their standard errors: noise of the data and ``template_error``.
    template_error : `numpy.ndarray`, (source,)
        The part of them that is from the templates of the source and of its neighbours.
    extended : `numpy.ndarray`, (source,), bool
        Whether the source is wider than the PSF.
    """

    flux: np.ndarray
    error: np.ndarray
    template_error: np.ndarray
    extended: np.ndarray


def total_fluxes(
    points: Sequence[Stamp], shapes: Sequence[Stamp], width: np.ndarray, coadd: Coadd
) -> TotalFluxes:
    r"""Fit the fluxes of all sources together, each with the template that the data allows.

    A template from the restored image holds some of the noise that it is fitted to, which makes faint point
    sources too bright. So the image is asked only where it knows:

    - what is not wider than the PSF, by a fit of the PSF ``P`` and of its change with width
      :math:`\nabla^2 P`, has the PSF as its template;
    - what is wider has its shape on the restored image, and the width of that shape is fitted too, so that
      too wide or too narrow a shape does not change the flux;
    - below `_SHAPE_SNR` no shape is known: the template is the PSF convolved with a round exponential disc
      (Freeman 1970, ApJ 160, 811) of the width that the data asks for, the width fitted too.

    Parameters
    ----------
    points : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.joint_fit.Stamp`]
        PSF at the position of each source, of unit flux.
    shapes : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.joint_fit.Stamp`]
        Shape of each source on the restored image, at the PSF of the coadd, of unit flux.
    width : `numpy.ndarray`, (source,)
        FWHM of the PSF at each source in pixels.
    coadd : `~lsst.coadd.deepprior.joint_fit.Coadd`
        Data and noise.

    Returns
    -------
    fluxes : `TotalFluxes`
        Fluxes and errors. The error of an extended source's template is the change of its flux when its
        width is fitted; those of its neighbours leave `SYSTEMATIC_FLOOR` of their light under the source.

    Raises
    ------
    ValueError
        Raised if there is not one point, shape and width for each source.
    """
    n = len(points)
    if len(shapes) != n or len(width) != n:
        raise ValueError(
            f"There are {n} points, {len(shapes)} shapes and {len(width)} widths; give one each."
        )
    test = JointFit.of([*points, *_widened(points)], coadd)
    solution, errors = test.solution(), test.errors()
    snr = solution[:n] / errors[:n]
    wider = solution[n:] > _EXTENDED * errors[n:]
    faint = snr < _SHAPE_SNR
    shaped = wider & ~faint
    own = [shape if use else point for shape, point, use in zip(shapes, points, shaped, strict=True)]
    free = np.flatnonzero(shaped | faint)
    variance = np.zeros(n)
    limit = (_MAX_WIDTH * np.asarray(width)) ** 2
    for number in range(_PASSES):
        fit = JointFit.of([*own, *_widened([own[k] for k in free])], coadd)
        solution = fit.solution()
        if number == _PASSES - 1:
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            variance[free] += np.nan_to_num(2.0 * solution[n:] / solution[free])
        variance = np.clip(variance, 0.0, limit)
        for k in np.flatnonzero(faint).tolist():
            own[k] = _disc(points[k], variance[k])
    flux, noise = solution[:n], fit.errors()[:n]
    fixed = JointFit.of(own, coadd)
    light = np.maximum(flux, 0.0)
    neighbours = fixed.normal @ light / fixed.normal.diagonal() - light
    template = np.hypot(np.where(shaped, flux - fixed.solution(), 0.0), SYSTEMATIC_FLOOR * neighbours)
    return TotalFluxes(flux, np.hypot(noise, template), template, wider)


def _widened(templates: Sequence[Stamp]) -> list[Stamp]:
    """Return the change of templates with half the variance of a Gaussian that they are convolved with."""
    return [t._replace(array=scipy.ndimage.laplace(t.array, mode="constant")) for t in templates]


def _disc(stamp: Stamp, variance: float) -> Stamp:
    """Convolve a stamp with a round exponential disc of some variance along each axis, in pixel^2.

    A disc of scale length h has the variance ``3 h^2`` along an axis, and the Fourier transform ``(1 + h^2
    k^2)^(-3/2)``. Light that leaves the stamp is lost.
    """
    if variance <= 0.0:
        return stamp
    border = math.ceil(4.0 * math.sqrt(variance))
    transform = np.fft.fft2(np.pad(stamp.array, border))
    rows, columns = (2.0 * np.pi * np.fft.fftfreq(size) for size in transform.shape)
    squared = rows[:, np.newaxis] ** 2 + columns**2
    smooth = np.fft.ifft2(transform * (1.0 + variance * squared / 3.0) ** -1.5).real
    height, width = stamp.array.shape
    return stamp._replace(array=smooth[border : border + height, border : border + width])
