# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import galsim
import numpy as np
import pytest
from toy import gaussian_stars

from lsst.coadd.deepprior.fitted_source import Source
from lsst.coadd.deepprior.galaxy_profiles import MAX_INDEX, MIN_INDEX
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.source_fit import SourceFit, fit_sources
from lsst.coadd.deepprior.stamps import Stamp

SHAPE, SEEING = (320, 290), 2.0
POINT_ERROR = np.sqrt(4.0 * np.pi) * SEEING
"""Standard error of the flux of a point source in noise of unit variance."""


def make_coadd(data: np.ndarray) -> Coadd:
    """Make a coadd of unit variance."""
    return Coadd(np.zeros(data.shape), 0.9, data, np.ones(data.shape), gaussian_stamp(SEEING, 31)[None, None])


def fit_grid(
    flux: float, index: float | None, radius: float, seed: int, sky: float = 0.0
) -> tuple[np.ndarray, np.ndarray, SourceFit]:
    """Fit a grid of equal stars (no index) or galaxies, starting a little beside their places."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[25:300:34, 23:270:34].reshape(2, -1).astype(float)
    y, x = grid + rng.uniform(-0.5, 0.5, grid.shape)
    image = rng.standard_normal(SHAPE) + sky
    if index is None:
        image += gaussian_stars(SHAPE, [(a, b, flux) for a, b in zip(x, y, strict=True)], SEEING)
    else:
        drawn = galsim.ImageD(*SHAPE[::-1], scale=1.0, xmin=0, ymin=0)
        for a, b in zip(x, y, strict=True):
            galaxy = galsim.Sersic(n=index, half_light_radius=radius, flux=flux)
            galaxy = galaxy.shear(q=rng.uniform(0.4, 0.9), beta=rng.uniform(0.0, 180.0) * galsim.degrees)
            seen = galsim.Convolve(galaxy, galsim.Gaussian(sigma=SEEING))
            seen.drawImage(drawn, center=galsim.PositionD(a, b), method="no_pixel", add_to_image=True)
        image += drawn.array
    shifts = rng.uniform(-0.1, 0.1, (2, len(y)))
    return y, x, fit_sources(y + shifts[0], x + shifts[1], [], make_coadd(image))


@pytest.mark.parametrize(("snr", "width_costs"), [(9.0, 3.0), (30.0, 3.0), (200.0, 1.0)])
def test_stars(snr: float, width_costs: float) -> None:
    """Fluxes and positions scatter by their errors; bright stars are as precise as the data allow."""
    flux = snr * POINT_ERROR
    y, x, found = fit_grid(flux, None, 0.0, seed=3)
    pull = (found.flux - flux) / found.error
    n = len(y)
    assert abs(pull.mean()) < 3.5 / np.sqrt(n)
    assert 0.75 < np.std(pull) < 1.25  # 72 stars tell it to 0.08
    offsets = np.array([(found.y - y) / found.y_err, (found.x - x) / found.x_err])
    assert 0.8 < np.std(offsets) < 1.2
    assert np.median(found.error) < 1.05 * width_costs * POINT_ERROR
    assert found.extended.mean() < 0.05


@pytest.mark.parametrize(("index", "radius", "snr"), [(1.0, 2.5, 60.0), (1.0, 2.0, 150.0), (2.5, 2.5, 150.0)])
def test_galaxies_of_unknown_shape(index: float, radius: float, snr: float) -> None:
    flux = snr * POINT_ERROR
    y, x, found = fit_grid(flux, index, radius, seed=4)
    pull = (found.flux - flux) / found.error
    assert found.extended.all()
    # All are alike, the prior expects a mixture: that may cost less than half a standard error.
    assert abs(np.median(found.flux / flux) - 1.0) < 0.5 * np.median(found.error) / flux
    assert abs(pull.mean()) < 0.5
    assert 0.75 < np.std(pull) < 1.25
    assert (found.shape_error < found.error).all()
    assert (found.shape_error > 0.3 * found.error).all()
    offsets = np.array([(found.y - y) / found.y_err, (found.x - x) / found.x_err])
    assert 0.8 < np.std(offsets) < 1.2


def test_faint_galaxies_have_the_errors_of_what_is_not_known() -> None:
    flux = 15.0 * POINT_ERROR
    _, _, found = fit_grid(flux, 1.0, 2.0, seed=5)
    assert abs(np.median(found.flux / flux) - 1.0) < 0.08
    assert abs(np.mean((found.flux - flux) / found.error)) < 0.4
    assert np.median(found.error) > 1.5 * POINT_ERROR


def test_positions_are_those_of_the_joint_solution() -> None:
    """In data without noise they are the true ones, closer than the steps after which the fit ends."""
    rng = np.random.default_rng(3)
    grid = np.mgrid[20:150:28, 20:140:28].reshape(2, -1)
    y, x = grid + rng.uniform(-0.5, 0.5, grid.shape)
    stars = [(a, b, 100.0 * POINT_ERROR) for a, b in zip(x, y, strict=True)]
    shifts = rng.uniform(-0.4, 0.4, grid.shape)
    found = fit_sources(
        y + shifts[0], x + shifts[1], [], make_coadd(gaussian_stars((160, 150), stars, SEEING))
    )
    np.testing.assert_allclose([found.y, found.x], [y, x], atol=3e-4)


@pytest.mark.parametrize("index", [MIN_INDEX, 1.4, MAX_INDEX])
def test_derivative_by_the_index_is_that_of_the_profiles(index: float) -> None:
    """Also at the limits, beyond which profiles do not change."""
    coadd = make_coadd(np.zeros((90, 80)))
    step = 0.02 if index == MIN_INDEX else -0.02
    source = Source(40.3, 41.6, variance=2.0, log_index=np.log(index))
    near = dataclasses.replace(source, log_index=source.log_index + step)
    own = source.stamp(coadd)
    expected = (near.stamp(coadd).array - own.array) / step
    found = source.derivatives(coadd, own)[3].array
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_what_is_at_a_limit_does_not_go_on() -> None:
    """Both components of an ellipticity on either side; radii and indices where they are large."""
    for outwards, held in (
        ([1.0, -1.0, 1.0, 1.0], [True] * 4),
        ([-1.0, 1.0, -1.0, -1.0], [False, True, True, False]),
    ):
        step = np.array(outwards)
        far = Source(40.0, 41.0, shape=np.zeros(4))
        for _ in range(20):
            far, _ = far.moved(np.concatenate([[0.0, 0.0], step]), np.array([40.0, 41.0]), 2.0)
        assert list(far.stuck(step, 2.0)) == held
        assert not far.stuck(-step, 2.0).any()
    for log_index, held in ((np.log(MIN_INDEX), False), (np.log(MAX_INDEX), True)):
        found = Source(40.0, 41.0, variance=0.0, log_index=log_index).stuck(np.sign([-1.0, log_index]), 2.0)
        assert list(found) == [False, held]


def test_close_pairs_know_that_they_are_close() -> None:
    """Fluxes of the members of a pair depend on where they are: errors are larger, and still right."""
    rng = np.random.default_rng(6)
    y, x = np.mgrid[25:300:34, 23:270:34].reshape(2, -1).astype(float)
    flux = 100.0 * POINT_ERROR
    stars = [(a + side * 1.9, b, flux) for a, b in zip(x, y, strict=True) for side in (-1.0, 1.0)]
    image = gaussian_stars(SHAPE, stars, SEEING) + rng.standard_normal(SHAPE)
    at = np.array([(b, a) for a, b, _ in stars]).T + rng.uniform(-0.3, 0.3, (2, len(stars)))
    found = fit_sources(*at, [], make_coadd(image))
    pull = (found.flux - flux) / found.error
    # The two of a pair are not independent; together they are as well known as a single star.
    assert abs(np.median(found.flux / flux) - 1.0) < 0.02
    assert 0.7 < 1.4826 * np.median(np.abs(pull)) < 1.3
    assert np.median(found.error) > 2.0 * POINT_ERROR


@pytest.mark.parametrize(
    ("separation", "snr", "ratio"), [(0.8, 60.0, 0.5), (0.5, 300.0, 0.5), (0.8, 2000.0, 0.02)]
)
def test_pairs_that_were_found_as_one_become_two(separation: float, snr: float, ratio: float) -> None:
    """Along all directions, and of unequal members; separations are in units of the FWHM."""
    rng = np.random.default_rng(9)
    y, x = np.mgrid[30:300:40, 28:270:40].reshape(2, -1).astype(float)
    half = 0.5 * separation * 2.3548 * SEEING
    angle = rng.uniform(0.0, np.pi, len(y))
    bright, faint = snr * POINT_ERROR, ratio * snr * POINT_ERROR
    members = [
        (a + side * half * np.cos(t), b + side * half * np.sin(t), flux)
        for a, b, t in zip(x, y, angle, strict=True)
        for side, flux in ((1.0, bright), (-1.0, faint))
    ]
    image = gaussian_stars(SHAPE, members, SEEING) + rng.standard_normal(SHAPE)
    found = fit_sources(y, x, [], make_coadd(image))
    two = np.bincount(found.parent)[found.parent] == 2
    assert two.sum() >= 0.9 * len(members)
    assert not found.extended[two].any()
    truth = np.array(members)
    distance = np.hypot(found.x[two, None] - truth[:, 0], found.y[two, None] - truth[:, 1])
    nearest = distance.argmin(axis=1)
    assert len(np.unique(nearest)) == two.sum()
    pull = (found.flux[two] - truth[nearest, 2]) / found.error[two]
    assert abs(np.median(pull)) < 0.4
    assert 0.7 < 1.4826 * np.median(np.abs(pull)) < 1.3


def test_a_point_beside_a_galaxy_is_no_pair_of_points() -> None:
    rng = np.random.default_rng(10)
    drawn = galsim.ImageD(80, 90, scale=1.0, xmin=0, ymin=0)
    galaxy = galsim.Convolve(
        galsim.Sersic(n=1.0, half_light_radius=4.0, flux=300.0 * POINT_ERROR), galsim.Gaussian(sigma=SEEING)
    )
    galaxy.drawImage(drawn, center=galsim.PositionD(42.5, 44.0), method="no_pixel")
    star = gaussian_stars((90, 80), [(37.5, 44.0, 300.0 * POINT_ERROR)], SEEING)
    image = drawn.array + star + rng.standard_normal((90, 80))
    found = fit_sources(np.array([44.0]), np.array([39.0]), [], make_coadd(image))
    assert len(found.flux) == 1


def test_a_fit_with_late_sources_goes_on_from_that_without_them() -> None:
    """Stars, a galaxy, and a pair seen as one; a late star beside the galaxy, and one far from all."""
    rng = np.random.default_rng(12)
    bright = 200.0 * POINT_ERROR
    drawn = galsim.ImageD(*SHAPE[::-1], scale=1.0, xmin=0, ymin=0)
    galaxy = galsim.Convolve(
        galsim.Sersic(n=1.0, half_light_radius=4.0, flux=2.0 * bright), galsim.Gaussian(sigma=SEEING)
    )
    galaxy.drawImage(drawn, center=galsim.PositionD(90.0, 130.0), method="no_pixel")
    pair = [(200.0, 60.0, bright), (203.4, 60.0, bright)]
    stars = [(40.0, 250.0, bright), (55.5, 250.0, bright), (230.0, 200.0, bright)]
    late = [(96.0, 133.0, 0.3 * bright), (150.0, 280.0, 0.3 * bright)]
    image = drawn.array + gaussian_stars(SHAPE, [*pair, *stars, *late], SEEING)
    coadd = make_coadd(image + rng.standard_normal(SHAPE))
    y = np.array([130.2, 60.1, 250.1, 249.8, 200.2])
    x = np.array([89.8, 201.7, 40.2, 55.4, 229.9])
    late_y, late_x = np.array([133.0, 280.0]), np.array([96.0, 150.0])
    first = fit_sources(y, x, [], coadd)
    assert np.bincount(first.parent).tolist() == [1, 2, 1, 1, 1]
    y, x = np.append(y, late_y), np.append(x, late_x)
    continued = fit_sources(y, x, [], coadd, known=first)
    anew = fit_sources(y, x, [], coadd)
    for fit in (continued, anew):
        assert np.bincount(fit.parent).tolist() == [1, 2, 1, 1, 1, 1, 1]
    order, anew_order = (np.lexsort((fit.x, fit.parent)) for fit in (continued, anew))
    for name in ("flux", "y", "x", "error", "y_err", "x_err"):
        error = anew.error if name in ("flux", "error") else anew.x_err
        difference = getattr(continued, name)[order] - getattr(anew, name)[anew_order]
        assert np.abs(difference / error[anew_order]).max() < 0.1, name
    np.testing.assert_array_equal(continued.extended[order], anew.extended[anew_order])
    # What has no light in common with the late ones was taken as it was.
    assert len({id(state) for state in first.states} & {id(state) for state in continued.states}) >= 4


def test_what_is_no_ellipse_has_larger_errors() -> None:
    """Three bright points, seen as one galaxy, which cannot have their shape, nor can a pair."""
    rng = np.random.default_rng(8)
    stars = [(38.0, 42.0, 1e5), (42.0, 42.0, 1e5), (40.0, 47.0, 1e5)]
    image = gaussian_stars((90, 80), stars, SEEING)
    found = fit_sources(
        np.array([43.7]), np.array([40.0]), [], make_coadd(image + rng.standard_normal((90, 80)))
    )
    assert len(found.flux) == 1
    assert found.shape_error[0] > 10.0 * POINT_ERROR
    assert abs(found.flux[0] - 3e5) < 4.0 * found.error[0]


def test_a_sky_that_was_left_does_not_change_fluxes() -> None:
    y, _, found = fit_grid(200.0 * POINT_ERROR, 1.0, 2.5, seed=7, sky=0.3)
    _, _, without = fit_grid(200.0 * POINT_ERROR, 1.0, 2.5, seed=7)
    assert abs(found.sky - 0.3) < 0.02
    np.testing.assert_allclose(found.flux, without.flux, rtol=2e-3)
    assert len(y) == len(found.flux)


def test_errors_know_that_the_sky_is_not_known() -> None:
    """On an island of data a galaxy leaves hardly a pixel that tells the sky."""
    flux = 300.0 * POINT_ERROR
    galaxy = galsim.Exponential(half_light_radius=4.0, flux=flux).shear(g1=0.2, g2=0.1)
    seen = galsim.Convolve(galaxy, galsim.Gaussian(sigma=SEEING))
    image = seen.drawImage(nx=75, ny=65, scale=1.0, method="no_pixel").array
    island = np.full(image.shape, np.nan)
    pulls = []
    for seed in range(16):
        noise = np.random.default_rng(seed).standard_normal(image.shape)
        island[17:48, 22:53] = (image + noise)[17:48, 22:53]
        found = fit_sources(np.array([32.0]), np.array([37.0]), [], make_coadd(island))
        pulls.append((found.flux[0] - flux) / found.error[0])
    assert 0.6 < np.std(pulls) < 1.3
    assert abs(np.mean(pulls)) < 0.8


def test_what_settled_with_a_negative_flux_is_subtracted_with_its_sign() -> None:
    flux = 400.0 * POINT_ERROR
    shape = (161, 150)
    galaxy = galsim.Sersic(n=1.5, half_light_radius=5.0, flux=flux).shear(g1=0.3, g2=0.1)
    seen = galsim.Convolve(galaxy, galsim.Gaussian(sigma=SEEING))
    drawn = galsim.ImageD(*shape[::-1], scale=1.0, xmin=0, ymin=0)
    seen.drawImage(drawn, center=galsim.PositionD(60.0, 80.0), method="no_pixel")
    image = drawn.array + gaussian_stars(shape, [(110.0, 130.0, -3.0 * flux)], SEEING)
    image += np.random.default_rng(0).standard_normal(shape)
    found = fit_sources(np.array([80.0, 130.0]), np.array([60.0, 110.0]), [], make_coadd(image))
    assert found.flux == pytest.approx([flux, -3.0 * flux], abs=4.0 * found.error.max())
    assert found.error.max() < 0.03 * flux


def test_bad_input_nothing_and_others() -> None:
    coadd = make_coadd(np.zeros((70, 90)))
    with pytest.raises(ValueError, match="one each"):
        fit_sources(np.array([20.0]), np.array([]), [], coadd)
    assert len(fit_sources(np.array([]), np.array([]), [], coadd).flux) == 0
    other = Stamp(40, 60, gaussian_stamp(3.0, 21))
    image = gaussian_stars((70, 90), [(25.0, 30.0, 900.0)], SEEING)
    image[other.slices] += 500.0 * other.array
    found = fit_sources(np.array([30.2]), np.array([24.9]), [other], make_coadd(image))
    np.testing.assert_allclose([found.flux[0], found.y[0], found.x[0]], [900.0, 30.0, 25.0], rtol=2e-3)
    np.testing.assert_allclose(found.other_flux, [500.0], rtol=2e-3)
    assert 0.5 < found.other_error[0] / (3.0 * np.sqrt(4.0 * np.pi)) < 2.0
    image = np.zeros((70, 90))
    image[other.slices] = 500.0 * other.array
    alone = fit_sources(np.zeros(0), np.zeros(0), [other], make_coadd(image + 1.0))
    np.testing.assert_allclose([*alone.other_flux, alone.sky], [500.0, 1.0], rtol=2e-3)
    np.testing.assert_allclose(alone.other_error, found.other_error, rtol=0.1)


@pytest.mark.parametrize(("snr", "radius"), [(60.0, 2.5), (100.0, 3.0)])
def test_profile_does_not_take_in_a_halo(snr: float, radius: float) -> None:
    """A galaxy on wide, faint light that is not its own: its size ends where it is no brighter than the
    noise, and so does what its fit says.
    """
    rng = np.random.default_rng(9)
    flux = snr * POINT_ERROR
    galaxy = galsim.Convolve(
        galsim.Sersic(n=1.0, half_light_radius=radius, flux=flux), galsim.Gaussian(sigma=SEEING)
    )
    drawn = galsim.ImageD(161, 141, scale=1.0, xmin=0, ymin=0)
    galaxy.drawImage(drawn, center=galsim.PositionD(80.3, 70.6), method="no_pixel")
    halo = gaussian_stars((141, 161), [(80.3, 70.6, 4.0 * flux)], 25.0)
    coadd = make_coadd(drawn.array + halo + rng.standard_normal((141, 161)))
    at = np.array([70.5]), np.array([80.4])
    free, limited = (fit_sources(*at, [], coadd, extent=extent) for extent in (None, np.array([8.0])))
    assert free.flux[0] > 2.5 * flux
    assert flux < limited.flux[0] < 1.7 * flux


def test_star_of_a_slightly_wrong_psf_is_no_galaxy() -> None:
    rng = np.random.default_rng(10)
    flux = 3000.0 * POINT_ERROR
    for wider, extended in ((1.01, False), (1.06, True)):
        star = gaussian_stars((80, 90), [(40.3, 35.6, flux)], wider * SEEING)
        coadd = make_coadd(star + rng.standard_normal(star.shape))
        found = fit_sources(np.array([35.5]), np.array([40.4]), [], coadd)
        assert found.extended[0] == extended
        assert found.flux[0] == pytest.approx(flux, rel=0.015)
