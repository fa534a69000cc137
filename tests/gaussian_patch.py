# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""A restored patch of Gaussian stars: the model carried to the coadd is known without our code."""

from __future__ import annotations

import dataclasses

import numpy as np

from lsst.coadd.deepprior.deblend import DetectionSettings
from lsst.coadd.deepprior.measure import MeasureInputs, measure_sources
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp

TARGET = 0.9  # sigma of the target PSF, pixels
NOISE = 10.0  # rms of the noise of the coadd, nJy
ORIGIN = (900, 2400)


def render(shape, x, y, flux, sigma):
    """Draw Gaussian stars at array positions; sigma may be an image."""
    image = np.zeros(shape)
    grid_y, grid_x = np.indices(shape, dtype=float)
    sigma = np.broadcast_to(sigma, shape)
    for x0, y0, f in zip(x, y, flux, strict=True):
        cut = (
            slice(max(int(y0) - 20, 0), int(y0) + 21),
            slice(max(int(x0) - 20, 0), int(x0) + 21),
        )
        square = (grid_x[cut] - x0) ** 2 + (grid_y[cut] - y0) ** 2
        image[cut] += f * np.exp(-0.5 * square / sigma[cut] ** 2) / (2 * np.pi * sigma[cut] ** 2)
    return image


@dataclasses.dataclass
class Patch:
    """A restored patch in plain arrays, which tests may spoil."""

    model: np.ndarray
    model_variance: np.ndarray
    residual: np.ndarray
    variance: np.ndarray
    psf: np.ndarray
    planes: dict[str, np.ndarray]
    inner: tuple[slice, slice]

    @property
    def inputs(self):
        model = np.nan_to_num(self.model)
        coadd = Coadd(model, TARGET, self.residual, self.variance, self.psf)
        return MeasureInputs(
            self.model, self.model_variance, TARGET, coadd, self.planes, origin=ORIGIN, inner=self.inner
        )


def make_inputs(shape, cells, x, y, flux, *, factor=1.0, shift=0.0, sigmas=None, seed=1, **planes):
    """Make a scene whose model holds ``factor`` of the flux, displaced by ``shift`` pixels in x."""
    sigmas = np.full(cells, 2.0) if sigmas is None else np.asarray(sigmas)
    sigma = np.repeat(np.repeat(sigmas, shape[0] // cells[0], axis=0), shape[1] // cells[1], axis=1)
    factor = np.broadcast_to(factor, np.shape(flux))
    x, y, flux = (np.asarray(a, dtype=float) for a in (x, y, flux))
    noise = np.random.default_rng(seed).normal(0.0, NOISE, shape)
    carried = render(shape, x + shift, y, factor * flux, sigma)
    return Patch(
        model=render(shape, x + shift, y, factor * flux, TARGET),
        model_variance=np.zeros(shape),
        residual=render(shape, x, y, flux, sigma) + noise - carried,
        variance=np.full(shape, NOISE**2),
        psf=np.array([[gaussian_stamp(s, 33) for s in row] for row in sigmas]),
        planes=planes,
        inner=(slice(ORIGIN[0] + 20, ORIGIN[0] + shape[0]), slice(ORIGIN[1], ORIGIN[1] + shape[1] - 30)),
    )


def pixel_to_sky(x, y):
    return 150.0 + x * 1e-4, 2.0 + y * 1e-4


def measure(patch, **settings):
    return measure_sources(patch.inputs, pixel_to_sky, DetectionSettings(**settings))


def match(table, x, y, radius=1.5):
    """Return the row of each true position, or fail."""
    dx = np.asarray(table["x"])[None, :] - ORIGIN[1] - np.asarray(x)[:, None]
    dy = np.asarray(table["y"])[None, :] - ORIGIN[0] - np.asarray(y)[:, None]
    distance = np.hypot(dx, dy)
    assert distance.min(axis=1).max() < radius
    return table[distance.argmin(axis=1)]


def enclosed(radius):
    """Return the part of a star that is within a radius in FWHM; pixels count with the part inside."""
    return 1.0 - np.exp(-0.5 * (radius * 2.0 * FWHM_PER_SIGMA) ** 2 / (2.0**2 + 1.0 / 12.0))


def robust_std(values):
    return 1.4826 * np.median(np.abs(values - np.median(values)))


def star_grid(shape, step, rng):
    """Positions with random sub-pixel phases that do not overlap."""
    y, x = np.mgrid[step : shape[0] - step // 2 : step, step : shape[1] - step // 2 : step]
    return (c.ravel() + rng.uniform(-2.0, 2.0, c.size) for c in (x, y))
