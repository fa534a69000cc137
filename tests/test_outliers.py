# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import maximum_likelihood
from lsst.coadd.deepprior.noise import CoaddLayers, coadd_layers
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.outliers import find_outliers, local_level, outlier_table, shared_deficit
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.resampling import Resampling

LAYOUT = CellLayout(2, 3, 40, 36)
SIGMA = 0.9
STARS = [(20.2, 15.7, 4000.0), (75.0, 50.4, 2000.0)]
SIGMAS = [1.5, 2.0, 1.8, 1.6, 1.7]
ORIGIN = (900, 2400)


def layers_with(extra: dict[int, list[tuple[float, float, float]]]) -> CoaddLayers:
    """Coadd visits of which some show point sources (x, y, flux) that the others do not."""
    visits = observe(LAYOUT, STARS, SIGMAS, seed=6)
    for index, sources in extra.items():
        visits[index].flux[...] += gaussian_stars(LAYOUT.shape, sources, SIGMAS[index]).astype(np.float32)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets(), steps=120).latent[0]
    return coadd_layers(data, latent)


def test_quiet_visits_have_no_outlier() -> None:
    assert layers_with({}).outliers == []


def test_a_star_that_moved_by_a_tenth_of_a_pixel_is_no_outlier() -> None:
    """It leaves ten standard deviations beside its peak."""
    x, y, flux = STARS[0]
    assert layers_with({2: [(x + 0.1, y, flux), (x, y, -flux)]}).outliers == []


def test_what_touches_an_outlier_is_rejected_from_2_5_standard_deviations() -> None:
    residual = torch.zeros(30, 30)
    residual[10, 10], residual[10, 11], residual[11, 10], residual[10, 12] = 14.0, 6.0, -4.0, 6.0
    residual[20, 20] = 6.0
    outliers = find_outliers(residual, torch.full((30, 30), 2.0), torch.ones(30, 30, dtype=torch.bool))
    assert outliers.nonzero().tolist() == [[10, 10], [10, 11]]


def test_correlated_noise_has_no_outlier_that_smoothing_makes() -> None:
    """Resampled noise is 1.3 times larger than white noise when it is smoothed; a trail still stands out."""
    shape = (900, 1000)
    resampling = Resampling(shape, "lanczos3", shift=(0.5, 0.5))
    noise = resampling.image(np.random.default_rng(2).standard_normal(resampling.detector_shape))
    noise /= np.sqrt(resampling.variance(np.ones(resampling.detector_shape)))
    slope = np.linspace(-0.3, 0.3, shape[0])[:, None]
    residual = torch.as_tensor(noise + slope, dtype=torch.float32)
    everywhere = torch.ones(shape, dtype=torch.bool)
    assert not find_outliers(residual, torch.ones(shape), everywhere).any()
    residual[400:402] += 2.5
    found = find_outliers(residual, torch.ones(shape), everywhere)
    assert found[400:402].to(torch.float32).mean() > 0.5
    assert not found[:390].any()
    assert not found[412:].any()


def test_a_transient_is_found_with_its_position_and_flux() -> None:
    """A source that one visit shows, across a border of cells, is clipped from the coadd and listed."""
    flux = 300.0
    layers = layers_with({2: [(36.3, 39.6, flux)]})
    assert layers.clipped[40, 36]
    brightest = max(layers.outliers, key=lambda one: one.psf_flux)
    assert brightest.visit == 2
    assert (brightest.x, brightest.y) == pytest.approx((36.3, 39.6), abs=0.25)
    assert brightest.psf_flux == pytest.approx(flux, abs=4.0 * brightest.psf_flux_err)
    # The noise of a PSF flux on white noise of 1 nJy.
    assert brightest.psf_flux_err == pytest.approx(np.sqrt(4.0 * np.pi) * SIGMAS[2], rel=0.03)
    assert brightest.length / brightest.width < 1.3


def test_a_moving_object_is_found_in_each_visit() -> None:
    path = {index: [(12.0 + 9.1 * index, 62.0 - 8.7 * index, 400.0)] for index in range(5)}
    found = layers_with(path).outliers
    for index, ((x, y, flux),) in path.items():
        near = [one for one in found if one.visit == index and np.hypot(one.x - x, one.y - y) < 1.0]
        assert len(near) == 1
        assert near[0].psf_flux == pytest.approx(flux, rel=0.15)


def test_a_trail_is_long() -> None:
    visits = observe(LAYOUT, STARS, SIGMAS, seed=6)
    visits[1].flux[60:62, 5:100] += 12.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets(), steps=120).latent[0]
    trail = max(coadd_layers(data, latent).outliers, key=lambda one: len(one.pixels[0]))
    assert trail.visit == 1
    assert trail.length > 15.0 * trail.width
    assert trail.y == pytest.approx(60.5, abs=0.3)


def test_an_outlier_has_no_pixels_where_the_model_is_wrong_in_all_visits() -> None:
    """A trail through a star that the model lacks: the light of the star is not that of the trail."""
    visits = observe(LAYOUT, STARS, SIGMAS, seed=6)
    visits[1].flux[15:17, 5:100] += 12.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    layers = coadd_layers(data, torch.zeros(data.shape))
    listed = np.zeros(LAYOUT.shape, dtype=bool)
    for one in layers.outliers:
        listed[one.pixels] = True
    np.testing.assert_array_equal(listed, layers.clipped)
    trails = [one for one in layers.outliers if one.visit == 1 and one.length > 5.0]
    assert sum(one.flux for one in trails) == pytest.approx(12.0 * 2 * 95, rel=0.15)


def test_the_centre_of_an_outlier_may_lie_in_a_cell_without_psf() -> None:
    visits = observe(LAYOUT, STARS, SIGMAS, seed=6)
    visits[1].psf[0, 0] = np.nan
    visits[1].good[:40, :36] = False
    visits[1].flux[40:42, 5:36] += 30.0
    visits[1].flux[8:42, 36:38] += 30.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets(), steps=120).latent[0]
    trail = max(coadd_layers(data, latent).outliers, key=lambda one: len(one.pixels[0]))
    assert trail.visit == 1
    assert trail.y < 40.0
    assert trail.x < 36.0
    assert np.isfinite([trail.psf_flux, trail.psf_flux_err]).all()


def test_table_of_outliers() -> None:
    layers = layers_with({2: [(36.3, 39.6, 300.0)], 0: [(90.0, 20.0, 300.0)]})
    visits = [SimpleNamespace(instrument="Cam", visit=100 + n, day_obs=20260101 + n) for n in range(5)]
    table = outlier_table(layers.outliers, visits, ORIGIN, lambda x, y: (x * 1e-4, y * 1e-4))
    assert set(table["visit"]) == {100, 102}
    row = table[np.argmax(np.where(table["visit"] == 102, table["psf_flux"], 0.0))]
    assert row["day_obs"] == 20260103
    assert (row["x"], row["y"]) == pytest.approx((2436.3, 939.6), abs=0.25)
    assert row["ra"] == pytest.approx(row["x"] * 1e-4)
    assert table["psf_flux"].unit == "nJy"
    assert all(column.description for column in table.columns.values())
    empty = outlier_table([], visits, ORIGIN, lambda x, y: (x, y))
    assert len(empty) == 0
    assert empty.colnames == table.colnames


def oversubtracted(depth: float, width: float) -> np.ndarray:
    """Draw a bowl with its middle at x = 60, y = 35."""
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    return -depth * np.exp(-0.5 * ((x - 60.0) ** 2 + (y - 35.0) ** 2) / width**2)


@pytest.mark.parametrize(("depth", "width"), [(0.5, 1e3), (1.0, 25.0)])
def test_sky_that_all_visits_lack_is_no_outlier(depth: float, width: float) -> None:
    """The image is not negative: all of it is in the residual, and none of it is clipped."""
    visits = observe(LAYOUT, [], [1.5, 1.6, 2.0, 1.8, 1.7, 1.6, 1.9], seed=6)
    sky = oversubtracted(depth, width)
    for visit in visits:
        visit.flux[...] += sky.astype(np.float32)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    layers = coadd_layers(data, torch.zeros(data.shape))
    assert layers.outliers == []
    assert not layers.clipped.any()
    assert np.mean(layers.residual) == pytest.approx(np.mean(sky), abs=0.02)


def test_outliers_are_found_where_the_sky_was_oversubtracted() -> None:
    """What one visit shows, or lacks, has the flux that it has beside that sky."""
    visits = observe(LAYOUT, [], SIGMAS, seed=6)
    for visit in visits:
        visit.flux[...] -= 0.5
    visits[2].flux[...] += gaussian_stars(LAYOUT.shape, [(36.3, 39.6, 300.0)], SIGMAS[2]).astype(np.float32)
    visits[4].flux[...] -= gaussian_stars(LAYOUT.shape, [(80.4, 21.2, 300.0)], SIGMAS[4]).astype(np.float32)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    transient, hole = coadd_layers(data, torch.zeros(data.shape)).outliers
    assert (transient.visit, hole.visit) == (2, 4)
    assert (transient.x, transient.y) == pytest.approx((36.3, 39.6), abs=0.25)
    assert transient.psf_flux == pytest.approx(300.0, abs=3.0 * transient.psf_flux_err)
    assert hole.psf_flux == pytest.approx(-300.0, abs=3.0 * hole.psf_flux_err)


@pytest.mark.parametrize(("sky", "n_passes"), [(0.0, 1), (-0.5, 2)])
def test_visits_are_judged_again_where_most_lack_light(
    sky: float, n_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = observe(LAYOUT, [], SIGMAS, seed=6)
    visits[1].flux[60:62, 5:100] += 12.0
    for visit in visits:
        visit.flux[...] += sky
    data, passes = PatchData(visits, LAYOUT, SIGMA, margin=8), []
    read = data.read
    monkeypatch.setattr(data, "read", lambda *some: passes.append(not some) or read(*some))
    coadd_layers(data, torch.zeros(data.shape))
    assert sum(passes) == n_passes


def test_the_deficit_is_what_most_visits_share() -> None:
    """Squares of 32 pixels, of which the last ones are cut off at 70 by 45."""
    rng = np.random.default_rng(4)
    residual = torch.as_tensor(2.0 * rng.standard_normal((4, 70, 45)), dtype=torch.float32)
    residual[:, :32] -= torch.tensor([1.0, 1.4, 1.6, 9.0])[:, None, None]
    residual[:2, 32:64] -= 1.0
    residual[:, 64:] += 1.0
    good = torch.ones(70, 45, dtype=torch.bool)
    good[:32, 32:] = False
    measured = [local_level(one, torch.full((70, 45), 2.0), good) for one in residual]
    levels, noise = (torch.stack(images) for images in zip(*measured, strict=True))
    assert levels.shape == noise.shape == (4, 3, 2)
    assert levels[:, 0, 0].tolist()[:3] == pytest.approx([-1.0, -1.4, -1.6], abs=0.2)
    assert bool(levels[:, 0, 1].isnan().all())
    assert noise[0, 1, 1] == pytest.approx(2.0)
    deficit = shared_deficit(levels, noise, (70, 45))
    assert deficit.shape == (70, 45)
    assert deficit[:16, :16].mean() == pytest.approx(-1.4, abs=0.15)
    assert not deficit[48:].any()
