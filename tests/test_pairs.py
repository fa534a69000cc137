# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Two points or one galaxy, in a box that begins at pixel (17, 38) of the patch."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from lsst.coadd.deepprior.galaxy_profiles import GalaxyShape, galaxy_stamp
from lsst.coadd.deepprior.pairs import Pair, fit_pair
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp
from lsst.coadd.deepprior.stamps import Stamp, render

SHAPE, SIGMA = (78, 102), 1.8
FWHM = SIGMA * FWHM_PER_SIGMA
PSF = gaussian_stamp(SIGMA, 25)
SIZE = 37
Y0, X0 = 17, 38
BOX = np.s_[Y0 : Y0 + SIZE, X0 : X0 + SIZE]
CENTRE = np.array([35.3, 56.2])


def coadd_of(image: np.ndarray) -> Coadd:
    return Coadd(np.zeros(SHAPE), 0.8, image, np.ones(SHAPE), np.tile(PSF, (2, 3, 1, 1)))


def points(separation: float, flux: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (y, x) of two points, at an angle from x to y, and their image."""
    along = 0.5 * separation * FWHM * np.array([np.sin(angle), np.cos(angle)])
    positions = np.array([CENTRE + along, CENTRE - along])
    empty = coadd_of(np.zeros(SHAPE))
    return positions, render([empty.point(*place) for place in positions], np.array(flux), SHAPE)


def fitted(image: np.ndarray, coadd: Coadd) -> Pair | None:
    """Fit a galaxy of index 1 to an image without noise, and see whether it is a pair in the coadd."""

    def galaxy(p: np.ndarray) -> np.ndarray:
        middle = np.array([Y0, X0]) + SIZE // 2
        return p[5] * galaxy_stamp(PSF, GalaxyShape(*p[2:5], 0.0), *(p[:2] - middle), SIZE)

    start = np.array([*CENTRE, 0.5, 0.0, 0.0, image.sum()])
    best = scipy.optimize.least_squares(
        lambda p: (galaxy(p) - image[BOX]).ravel(), start, x_scale=abs(start) + 0.1
    ).x
    stamp = Stamp(Y0, X0, galaxy(best) / best[5])
    shape = GalaxyShape(*best[2:5].tolist(), 0.0)
    return fit_pair(coadd.image[BOX], coadd.image[BOX] - galaxy(best), stamp, shape, coadd)


@pytest.mark.parametrize("angle", [0.4, 1.3, 2.5])
@pytest.mark.parametrize(("separation", "flux"), [(0.6, (4000.0, 4000.0)), (1.1, (4000.0, 1500.0))])
def test_two_points_have_their_places_and_fluxes(
    separation: float, flux: tuple[float, float], angle: float
) -> None:
    positions, image = points(separation, flux, angle)
    noise = np.random.default_rng(1).standard_normal(SHAPE)
    pair = fitted(image, coadd_of(image + noise))
    assert pair is not None
    order = np.argsort(np.hypot(*(pair.positions - positions[0]).T))
    np.testing.assert_allclose(pair.positions[order], positions, atol=0.06)
    np.testing.assert_allclose(pair.flux[order], flux, rtol=0.04)


def test_a_galaxy_and_points_that_are_too_close_are_none() -> None:
    galaxy = 8000.0 * galaxy_stamp(PSF, GalaxyShape(np.log(2.0), 0.5, 0.3, 0.0), 0.3, -0.2, SIZE)
    noise = np.random.default_rng(2).standard_normal(SHAPE)
    image = np.zeros(SHAPE)
    image[BOX] = galaxy
    assert fitted(image, coadd_of(image + noise)) is None
    _, image = points(0.25, (2e5, 2e5), 0.4)
    assert fitted(image, coadd_of(image + noise)) is None
    _, image = points(1.2, (1e5, 400.0), 0.4)
    assert fitted(image, coadd_of(image + noise)) is None, "the fainter one may be an error of the PSF"


def test_what_is_near_the_noise_is_no_pair_and_less_so_where_the_noise_is_correlated() -> None:
    """The correlation makes the errors 2.4 times larger."""
    _, image = points(0.8, (600.0, 600.0), 0.4)
    lags = np.array([0.2, 0.6, 1.0, 0.6, 0.2])
    found = [
        [
            fitted(scale * image, coadd) is not None
            for coadd in (white, white.correlated(np.outer(lags, lags)))
        ]
        for scale in (0.2, 0.5, 1.5)
        for white in [coadd_of(scale * image)]
    ]
    assert found == [[False, False], [True, False], [True, True]]


def test_without_data_there_is_no_pair() -> None:
    _, image = points(1.0, (4000.0, 4000.0), 0.4)
    hidden = image.copy()
    hidden[BOX] = np.nan
    assert fitted(image, coadd_of(hidden)) is None
