# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""One source of a joint fit: its parameters, their prior, and how its image changes with them."""

from __future__ import annotations

__all__ = ("MAX_WIDTH", "POSITION_STEP", "Source")

import dataclasses
import math

import numpy as np

from .galaxy_profiles import MAX_INDEX, MIN_INDEX, GalaxyShape, galaxy_stamp
from .plain_coadd import Coadd
from .stamps import Stamp, slope

MAX_WIDTH = 1.0
"""Largest sigma, in units of the FWHM of the coadd PSF, of sources whose width is fitted."""

POSITION_STEP = 0.3
"""Largest step of a position in pixels."""

_SHAPE_STEP = np.array([0.4, 0.25, 0.25, 0.4])
"""Largest steps of `~lsst.coadd.deepprior.galaxy_profiles.GalaxyShape`."""

_SHAPE_MEAN = np.array([math.log(2.0), 0.0, 0.0, math.log(1.4)])
_SHAPE_SIGMA = np.array([1.0, 0.35, 0.35, 0.6])
"""Population of the shapes, which decides what the data leave open: half-light radii of 2 pixels within a
factor of e, axis ratios of a/b = 2 at one standard deviation, and indices with the mean and the scatter of
log n of three discs (n = 1) to a bulge (n = 4)."""

_PART_OF_EXTENT = 0.5
"""Largest half-light radius, as part of the radius of the region in which a source is brighter than the
noise, grown by a FWHM: a profile that reaches further takes in the light of neighbours and of the sky. In
simulated fields no galaxy comes above 0.42."""

_AT_LIMIT = 1e-6
"""Distance from a limit, in units of the parameter, within which it is reached."""

_LOWEST = np.array([math.log(0.1), -1.2, -1.2, math.log(MIN_INDEX)])
_HIGHEST = np.array([math.log(40.0), 1.2, 1.2, math.log(MAX_INDEX)])
_HELD = np.array([-math.inf, -1.2, -1.2, -math.inf])
"""Lower limits at which a shape stays in the last solution. Radii and indices go on there, as variances do
below 0: what noise makes of points must not be wider in the mean."""

_DIFFERENCE = 0.02
_VARIANCE_DIFFERENCE = 0.2
"""Steps of shape parameters and of a variance in pixel^2 for derivatives."""

_DISC_RADIUS = 1.678
"""Half-light radius of an exponential disc in units of its scale length."""


@dataclasses.dataclass
class Source:
    """Present state of a source of a joint fit.

    Its parameters besides flux and position are none for a point; the variance that a round profile adds
    along each axis, in pixel^2, and the logarithm of its index, if ``variance`` is not `None`; all of
    `~lsst.coadd.deepprior.galaxy_profiles.GalaxyShape`, if ``shape`` is not `None`.

    Parameters
    ----------
    y, x : `float`
        Position in the array of the patch.
    variance, log_index : `float`, optional
        Those of a round profile.
    shape : `numpy.ndarray`, (4,), optional
        That of a galaxy.
    extent : `float`, optional
        Radius in pixels of the region in which the source is brighter than the noise, grown by a FWHM, which
        limits its size.
    """

    y: float
    x: float
    variance: float | None = None
    log_index: float = float(_SHAPE_MEAN[3])
    shape: np.ndarray | None = None
    extent: float = math.inf

    def stamp(self, coadd: Coadd) -> Stamp:
        """Draw the source with unit flux."""
        if self.shape is not None:
            shape = GalaxyShape(*self.shape)
        elif self.variance:
            shape = GalaxyShape(_log_radius(self.variance), 0.0, 0.0, self.log_index)
        else:
            return coadd.point(self.y, self.x)
        k = coadd.psf.shape[-1]
        size = k + 2 * math.ceil(min(4.0 * math.exp(shape.log_radius), 2 * k))
        iy, ix, half = round(self.y), round(self.x), size // 2

        def draw(psf: np.ndarray) -> Stamp:
            return Stamp(iy - half, ix - half, galaxy_stamp(psf, shape, self.y - iy, self.x - ix, size))

        return coadd.drawn(self.y, self.x, draw)

    def derivatives(self, coadd: Coadd, own: Stamp) -> list[Stamp]:
        """Return the changes of a unit flux with y and x, and with the other parameters."""
        result = [slope(own, 0), slope(own, 1)]
        if self.shape is not None:
            for k in range(len(self.shape)):
                step = np.zeros(len(self.shape))
                step[k] = _DIFFERENCE if self.shape[k] + _DIFFERENCE <= _HIGHEST[k] else -_DIFFERENCE
                other = dataclasses.replace(self, shape=self.shape + step)
                result.append(_difference(other.stamp(coadd), own, step[k]))
        elif self.variance is not None:
            wider = dataclasses.replace(self, variance=self.variance + _VARIANCE_DIFFERENCE)
            result.append(_difference(wider.stamp(coadd), own, _VARIANCE_DIFFERENCE))
            change = _DIFFERENCE if self.log_index + _DIFFERENCE <= _HIGHEST[3] else -_DIFFERENCE
            other = dataclasses.replace(self, log_index=self.log_index + change)
            result.append(_difference(other.stamp(coadd), own, change))
        return result

    def shaped(self, variance: float) -> Source:
        """Return a galaxy of the mean shape of the population whose round profile has some variance."""
        shape = _SHAPE_MEAN.copy()
        shape[0] = _log_radius(variance)
        return dataclasses.replace(self, shape=shape)

    def moved(self, step: np.ndarray, start: np.ndarray, limit: float) -> tuple[Source, float]:
        """Return the source behind a step, as far as is allowed.

        Parameters
        ----------
        step : `numpy.ndarray`, (parameter,)
            Step of the parameters that `derivatives` are by; positions move against its sign.
        start : `numpy.ndarray`, (2,)
            Position (y, x) that the fit began with.
        limit : `float`
            Largest distance from it along each axis, in pixels.

        Returns
        -------
        source : `Source`
            The source that has moved.
        distance : `float`
            How far, in units of the largest step.
        """
        before = np.array([self.y, self.x])
        after = before + np.clip(-step[:2], -POSITION_STEP, POSITION_STEP)
        after = np.clip(after, start - limit, start + limit)
        result = dataclasses.replace(self, y=float(after[0]), x=float(after[1]))
        moves = [np.abs(after - before) / POSITION_STEP]
        if self.shape is not None:
            shape = self.shape + np.clip(step[2:], -_SHAPE_STEP, _SHAPE_STEP)
            shape = np.clip(shape, _LOWEST, self._highest(limit))
            moves.append(np.abs(shape - self.shape) / _SHAPE_STEP)
            result.shape = shape
        elif self.variance is not None:
            widest, highest = self._highest(limit).tolist()
            variance = min(max(self.variance + min(max(float(step[2]), -1.0), 1.0), 0.0), widest)
            largest = _SHAPE_STEP[3]
            index = np.clip(self.log_index + np.clip(step[3], -largest, largest), _LOWEST[3], highest)
            moves.append(np.abs([variance - self.variance, (index - self.log_index) / largest]))
            result.variance, result.log_index = variance, float(index)
        return result, float(np.concatenate(moves).max())

    def _highest(self, limit: float) -> np.ndarray:
        """Return the upper limits of the parameters besides flux and position, with the limit of `moved`."""
        radius = _PART_OF_EXTENT * self.extent
        if self.shape is not None:
            return np.minimum(_HIGHEST, [math.log(radius), np.inf, np.inf, np.inf])
        widest = min(2.0 * MAX_WIDTH * limit, math.sqrt(3.0) / _DISC_RADIUS * radius)
        return np.array([widest**2, _HIGHEST[3]])

    def stuck(self, change: np.ndarray, limit: float) -> np.ndarray:
        """Return which parameters besides flux and position are at their upper limits, or those of the
        ellipticity at their lower ones, and would go on.

        Parameters
        ----------
        change : `numpy.ndarray`, (parameter,)
            Changes of these parameters.
        limit : `float`
            That of `moved`.

        Returns
        -------
        stuck : `numpy.ndarray`, (parameter,), bool
            The parameters.
        """
        if self.shape is not None:
            present = self.shape
        elif self.variance is not None:
            present = np.array([self.variance, self.log_index])
        else:
            return np.zeros(0, dtype=bool)
        lowest = -math.inf if self.shape is None else _HELD
        above = (present >= self._highest(limit) - _AT_LIMIT) & (change > 0.0)
        return above | ((present <= lowest + _AT_LIMIT) & (change < 0.0))

    def prior(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how far the parameters besides flux and position are below the mean of the population, and
        their precisions.
        """
        if self.shape is not None:
            return _SHAPE_MEAN - self.shape, _SHAPE_SIGMA**-2.0
        if self.variance is not None:
            return np.array([0.0, _SHAPE_MEAN[3] - self.log_index]), np.array([0.0, _SHAPE_SIGMA[3] ** -2.0])
        return np.zeros(0), np.zeros(0)


def _log_radius(variance: float) -> float:
    """Return the logarithm of the half-light radius of an exponential disc of some variance along an axis."""
    return math.log(_DISC_RADIUS * math.sqrt(variance / 3.0))


def _difference(one: Stamp, other: Stamp, step: float) -> Stamp:
    """Return ``(one - other) / step`` on the box of the second."""
    result = np.zeros(other.array.shape)
    y0, x0 = max(one.y0, other.y0), max(one.x0, other.x0)
    y1 = min(one.slices[0].stop, other.slices[0].stop)
    x1 = min(one.slices[1].stop, other.slices[1].stop)
    result[y0 - other.y0 : y1 - other.y0, x0 - other.x0 : x1 - other.x0] = (
        one.array[y0 - one.y0 : y1 - one.y0, x0 - one.x0 : x1 - one.x0]
        - other.array[y0 - other.y0 : y1 - other.y0, x0 - other.x0 : x1 - other.x0]
    ) / step
    return other._replace(array=result)
