# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from lsst.coadd.deepprior.confusion import confusion_error, unseen_light
from lsst.coadd.deepprior.galaxy_profiles import GalaxyShape, galaxy_stamp
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import gaussian_stamp, shift_stamp
from lsst.coadd.deepprior.source_fit import fit_sources
from lsst.coadd.deepprior.stamps import Stamp, render

SHAPE = (330, 480)
SIGMA = 1.7
PSF = shift_stamp(gaussian_stamp(SIGMA, 25), 0.4, -0.2)  # not its own mirror image
POINT_ERROR = (PSF**2).sum() ** -0.5
AREA = 2.0 * np.pi * SIGMA**2
"""Integral of the squared overlap of two Gaussian PSFs at all distances, in pixels."""


def make_coadd(image: np.ndarray, *, hole: bool = False) -> Coadd:
    """Return a coadd of 2x3 cells with noise of unit variance, one cell missing if asked for."""
    psf = np.tile(PSF, (2, 3, 1, 1))
    variance = np.ones(SHAPE)
    if hole:
        psf[0, 0] = np.nan
        variance[: SHAPE[0] // 2, : SHAPE[1] // 3] = np.nan
    return Coadd(np.zeros(SHAPE), 0.8, image, variance, psf)


def sea(rng: np.random.Generator, excess: float, per_area: float) -> tuple[np.ndarray, float]:
    """Return an image of unseen point sources about a mean of 0, and their number a pixel times their
    squared flux.

    Parameters
    ----------
    excess : `float`
        Variance that they add to PSF fluxes, in units of that of the noise.
    per_area : `float`
        Their number in ``AREA``.
    """
    light = excess * POINT_ERROR**2 / AREA
    density = per_area / AREA
    n = rng.poisson(density, SHAPE)
    image = scipy.signal.fftconvolve(n * np.sqrt(light / density), PSF, mode="same")
    return image - image.mean(), light


@pytest.mark.parametrize("hole", [False, True])
def test_light_of_unseen_sources_is_measured(hole: bool) -> None:
    """A dense sea of faint sources, beside bright ones that are known."""
    rng = np.random.default_rng(5)
    unseen, light = sea(rng, 0.5, 3.0)
    image = rng.normal(size=SHAPE) + unseen
    y, x = rng.uniform(0, SHAPE[0], 60), rng.uniform(0, SHAPE[1], 60)
    bright = make_coadd(np.zeros(SHAPE))
    image += 0.3 * render([bright.point(*one) for one in zip(y, x, strict=True)], np.full(60, 1e3), SHAPE)
    found = unseen_light(image, y, x, make_coadd(image, hole=hole))
    np.testing.assert_allclose(found, light, rtol=0.3)
    # A few that were missed are no crowd.
    assert unseen_light(image, y[:-5], x[:-5], make_coadd(image, hole=hole)) < 2.0 * light


def test_noise_alone_is_no_light() -> None:
    rng = np.random.default_rng(6)
    image = rng.normal(size=SHAPE)
    none = np.zeros(0)
    assert unseen_light(image, none, none, make_coadd(image)) * AREA < 0.06 * POINT_ERROR**2
    assert unseen_light(0.5 * image, none, none, make_coadd(image)) == 0.0


def test_correlated_noise_is_no_light() -> None:
    rng = np.random.default_rng(7)
    row = np.array([0.3, 1.0, 0.5])
    image = scipy.ndimage.convolve(rng.normal(size=SHAPE), np.outer(row, row), mode="wrap")
    scale = np.square(row).sum()
    lags = np.correlate(row, row, "full")
    coadd = make_coadd(image / scale).correlated(np.outer(lags, lags) / scale**2)
    none = np.zeros(0)
    median = np.median(coadd.information)
    assert unseen_light(image / scale, none, none, coadd) * AREA * median < 0.1


def test_a_crowd_leaves_no_blank_places() -> None:
    rng = np.random.default_rng(8)
    image = 3.0 * rng.normal(size=SHAPE)
    y, x = (axis.ravel() for axis in np.mgrid[4 : SHAPE[0] : 8, 4 : SHAPE[1] : 8].astype(float))
    assert unseen_light(image, y, x, make_coadd(image)) == 0.0
    assert unseen_light(image, y[:9], x[:9], make_coadd(image)) > 0.0
    nothing = make_coadd(np.full(SHAPE, np.nan))
    assert unseen_light(np.zeros(SHAPE), y, x, nothing) == 0.0


def test_error_of_weights() -> None:
    """Of a PSF flux it is that of the definition; of a plain sum, that of the number of sources."""
    np.testing.assert_allclose(
        confusion_error(PSF / (PSF**2).sum(), PSF, 2.0), np.sqrt(2.0 * AREA), rtol=2e-3
    )
    np.testing.assert_allclose(confusion_error(np.ones((200, 300)), PSF, 2.0), np.sqrt(12e4), rtol=0.02)


def test_fluxes_in_a_sea_of_unseen_sources_have_their_errors() -> None:
    """Stars and wide galaxies: the galaxies reach more of the sea."""
    rng = np.random.default_rng(9)
    unseen, _ = sea(rng, 1.0, 3.0)
    y, x = (axis.ravel() for axis in np.mgrid[30 : SHAPE[0] : 45, 30 : SHAPE[1] : 45].astype(float))
    shape = GalaxyShape(np.log(4.0), 0.2, 0.1, 0.0)
    size = 25 + 40
    galaxy = galaxy_stamp(PSF, shape, 0.0, 0.0, size)
    wide = np.arange(len(y)) % 2 == 1
    templates = [
        Stamp(int(b) - size // 2, int(a) - size // 2, galaxy).cropped(SHAPE)
        if extended
        else Stamp(int(b) - 12, int(a) - 12, PSF).cropped(SHAPE)
        for b, a, extended in zip(y, x, wide, strict=True)
    ]
    flux = np.where(wide, 200.0, 80.0) * POINT_ERROR
    image = rng.normal(size=SHAPE) + unseen + render(templates, flux, SHAPE)
    fit = fit_sources(y, x, [], make_coadd(image))
    first = np.unique(fit.parent, return_index=True)[1]
    error, confusion = fit.error[first], fit.confusion_error[first]
    pull = (fit.flux[first] - flux) / error
    alone = (fit.flux[first] - flux) / np.sqrt(error**2 - confusion**2)
    for some in (wide, ~wide):
        assert 0.75 < np.std(pull[some]) < 1.2
        assert np.std(alone[some]) > 1.3
    assert np.median(confusion[wide]) > 2.0 * np.median(confusion[~wide])
