# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Fluxes of sources at given positions, through the PSF and in apertures."""

from __future__ import annotations

__all__ = ("APERTURES", "point_and_aperture_fluxes")

import math
from collections.abc import Sequence

import numpy as np
import sep

from .joint_fit import JointFit, sky_responses
from .plain_coadd import Coadd
from .stamps import Stamp, render

APERTURES = (1.0, 1.5, 2.5)
"""Radii of the aperture fluxes, in units of the FWHM of the coadd PSF at the source."""


def point_and_aperture_fluxes(
    y: np.ndarray,
    x: np.ndarray,
    templates: Sequence[Stamp],
    flux: np.ndarray,
    flux_err: np.ndarray,
    coadd: Coadd,
    sky_error: float,
) -> dict[str, np.ndarray]:
    """Measure PSF fluxes (one joint fit) and aperture fluxes (neighbours subtracted) at given positions.

    Parameters
    ----------
    y, x : `numpy.ndarray`, (source,)
        Positions in the array of the patch.
    templates : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.stamps.Stamp`]
        The sources as they were fitted, of unit flux.
    flux, flux_err : `numpy.ndarray`, (source,)
        Their fluxes and errors in nJy.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Data above the sky, and noise.
    sky_error : `float`
        Standard error of that sky, in nJy a pixel.

    Returns
    -------
    columns : `dict` [`str`, `numpy.ndarray`], (source,)
        ``psf_flux``, ``ap1_flux`` and so on in nJy, and with ``_err`` behind the name their errors, which
        hold that of the sky; ``coadd_fwhm``, that of the PSF in pixels. NaN where there are no data.
    """
    n = len(templates)
    points = [coadd.point(*position) for position in zip(y, x, strict=True)]
    usable = np.array([(coadd.weight[p.slices] * p.array**2).sum() > 0.0 for p in points])
    psf_flux = np.full((2, n), np.nan)
    if usable.any():
        used = [point for point, use in zip(points, usable, strict=True) if use]
        fit = JointFit.of(used, coadd)
        _, response = sky_responses(fit, used, coadd)
        psf_flux[:, usable] = fit.solution(), np.hypot(fit.errors(), response * sky_error)
    scale = coadd.fwhm_at(y, x)
    columns = {"psf_flux": psf_flux[0], "psf_flux_err": psf_flux[1], "coadd_fwhm": scale}

    excess = {width: _aperture_excess(coadd, width) for width in np.unique(scale)}
    left = np.where(coadd.good, coadd.image - render(templates, flux, coadd.shape), 0.0)
    unseen = np.zeros(coadd.shape)
    sums = np.full((n, len(APERTURES), 2), np.nan)
    for k, own in enumerate(templates):
        circles = *np.tile([[x[k]], [y[k]]], len(APERTURES)), scale[k] * np.array(APERTURES)
        left[own.slices] += flux[k] * own.array
        total, noise, _ = sep.sum_circle(left, *circles, var=coadd.variance, subpix=0)
        left[own.slices] -= flux[k] * own.array
        unseen[own.slices] = np.where(coadd.good[own.slices], 0.0, own.array)
        part, _, _ = sep.sum_circle(unseen, *circles, subpix=0)
        unseen[own.slices] = 0.0
        noise = np.hypot(noise * np.sqrt(excess[scale[k]]), sky_error * np.pi * circles[2] ** 2)
        sums[k] = np.transpose([total, np.hypot(noise, part * flux_err[k])])
    for a in range(len(APERTURES)):
        columns[f"ap{a + 1}_flux"], columns[f"ap{a + 1}_flux_err"] = sums[:, a].T
    return columns


def _aperture_excess(coadd: Coadd, width: float) -> np.ndarray:
    """Return the factors by which the correlation of noise changes the variances of aperture fluxes."""
    excess = []
    for radius in width * np.array(APERTURES):
        reach = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
        excess.append(coadd.noise_excess((np.hypot(reach[:, None], reach) <= radius).astype(float)))
    return np.array(excess)
