# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Two points or one galaxy? Least squares of both on the data of one source."""

from __future__ import annotations

__all__ = ("Pair", "fit_pair")

import dataclasses
import functools
import math

import numpy as np
import scipy.optimize

from .galaxy_profiles import GalaxyShape
from .plain_coadd import Coadd
from .stamps import Stamp, render, slope

_CLEARLY = 25.0
"""How much less the chi-square of two points must be than that of a galaxy, whose profile has one parameter
more."""

_LEAST_SEPARATION = 0.35
"""Smallest separation of a pair in units of the FWHM: two nearer points cannot be told from a galaxy."""

_STARTS = (0.6, 1.0)
"""Separations that the fit starts from, in units of the FWHM."""

_ENOUGH = 1e-5
_MAX_STEPS = 20
"""Relative change of the chi-square at which the fit ends, far less than what decides, and the largest number
of steps."""

_FOOTPRINT = 0.02
_MISFIT = 3.0
"""Brightness, as part of the peak, down to which pixels tell whether a pair fits, and the standard deviations
of its reduced chi-square above 1 from which it does not: a point beside a galaxy is no pair of points."""

_PSF_ERROR = 0.01
"""Relative error of the PSF that pixels are granted there."""

_LEAST_SHARE = _PSF_ERROR
"""Smallest part of the flux of a pair that its fainter member has: less may be an error of the PSF."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two points.

    Parameters
    ----------
    positions : `numpy.ndarray`, (2, 2)
        Positions (y, x) of both in the array of the patch.
    flux : `numpy.ndarray`, (2,)
        Their fluxes in nJy.
    """

    positions: np.ndarray
    flux: np.ndarray


def fit_pair(
    alone: np.ndarray, left: np.ndarray, galaxy: Stamp, shape: GalaxyShape, coadd: Coadd
) -> Pair | None:
    """Fit two points to the data of a source that was fitted as a galaxy.

    Parameters
    ----------
    alone : `numpy.ndarray`, (y, x)
        Data in the box of the galaxy without sky and all other sources, in nJy.
    left : `numpy.ndarray`, (y, x)
        The same without the galaxy.
    galaxy : `~lsst.coadd.deepprior.stamps.Stamp`
        The galaxy as it was fitted, of unit flux.
    shape : `~lsst.coadd.deepprior.galaxy_profiles.GalaxyShape`
        Its shape, along which the points are looked for.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        Noise and PSF.

    Returns
    -------
    pair : `Pair` or `None`
        The points, if they fit clearly better, and well.
    """
    box = galaxy.slices
    good = coadd.good[box]
    if not good.any():
        return None
    weight = np.where(good, coadd.variance[box], np.inf) ** -0.5
    y, x = (float(c) for c in np.unravel_index(galaxy.array.argmax(), galaxy.array.shape))
    centre = np.array([galaxy.y0 + y, galaxy.x0 + x])
    fwhm = float(coadd.fwhm[coadd.cell(*centre)])
    data = (weight * alone).ravel()

    def drawn(stamp: Stamp) -> np.ndarray:
        inside = stamp._replace(y0=stamp.y0 - galaxy.y0, x0=stamp.x0 - galaxy.x0).cropped(alone.shape)
        return (weight * render([inside], np.ones(1), alone.shape)).ravel()

    @functools.lru_cache(maxsize=2)
    def solved(y0: float, x0: float, y1: float, x1: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the residuals, the fluxes, and the derivatives of the residuals by the places, to which the
        fluxes adapt (Kaufman 1975, BIT 15, 49).
        """
        points = [coadd.point(y0, x0), coadd.point(y1, x1)]
        design = np.column_stack([drawn(one) for one in points])
        # A point that moves up by d looks like itself less d times its slope.
        change = np.column_stack([drawn(slope(one, axis)) for one in points for axis in (0, 1)])
        along = np.linalg.lstsq(design, np.column_stack([data, change]))[0]
        flux = along[:, 0]
        return data - design @ flux, flux, (change - design @ along[:, 1:]) * np.repeat(flux, 2)

    angle = 0.5 * math.atan2(shape.e2, shape.e1)
    along = np.array([math.sin(angle), math.cos(angle)])
    fits = []
    for separation in _STARTS:
        start = np.concatenate([centre + 0.5 * sign * separation * fwhm * along for sign in (1.0, -1.0)])
        bounds = (start - fwhm, start + fwhm)
        fits.append(
            scipy.optimize.least_squares(
                lambda places: solved(*places.tolist())[0],
                start,
                jac=lambda places: solved(*places.tolist())[2],
                bounds=bounds,
                ftol=_ENOUGH,
                max_nfev=_MAX_STEPS,
            )
        )
    best = min(fits, key=lambda fit: float(fit.cost))
    places, (rest, flux, _) = best.x.reshape(2, 2), solved(*best.x.tolist())
    excess = coadd.noise_excess(coadd.psf_at(*centre))
    gain = float(np.sum((weight * left) ** 2) - np.sum(rest**2))
    model = data - rest
    lit = model > _FOOTPRINT * model.max(initial=0.0)
    reduced = float(np.mean(rest[lit] ** 2 / (1.0 + (_PSF_ERROR * model[lit]) ** 2))) if lit.any() else np.inf
    correlated = float((coadd.noise_correlation**2).sum())
    if (
        gain < _CLEARLY * excess
        or reduced > 1.0 + _MISFIT * math.sqrt(2.0 * correlated / max(int(lit.sum()), 1))
        or np.hypot(*(places[0] - places[1])) < _LEAST_SEPARATION * fwhm
        or flux.min() < _LEAST_SHARE * flux.sum()
    ):
        return None
    return Pair(places, flux)
