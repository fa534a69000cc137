# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.noise import NoisyModel, coadd_layers, entering_visits, local_variance
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp, inner_sigma

LAYOUT = CellLayout(2, 3, 30, 26)
SIGMA = 0.9
STARS = [(20.2, 15.7, 4000.0), (55.0, 40.4, 2000.0)]


def true_latent(data: PatchData) -> torch.Tensor:
    """Return stars as Gaussians of sigma (g^2 - r^2)^(1/2), so that r * u has the PSF g."""
    latent = torch.zeros(data.shape, dtype=data.dtype)
    latent[8:-8, 8:-8] = torch.as_tensor(
        gaussian_stars(LAYOUT.shape, STARS, np.sqrt(SIGMA**2 - inner_sigma(SIGMA) ** 2))
    )
    return latent


def test_maximum_likelihood_makes_stars_the_target_at_every_phase() -> None:
    """Noiseless stars at 5x5 sub-pixel phases come out with the size, flux and position of g."""
    layout = CellLayout(1, 1, 128, 130)
    stars = [(14.0 + 25.2 * i, 13.0 + 25.2 * j, 1e4) for i in range(5) for j in range(5)]
    visits = observe(layout, stars, [1.5, 1.8, 2.1, 1.6], noiseless=True, noise=0.1)
    data = PatchData(visits, layout, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets()).latent
    assert float(latent.min()) >= 0.0
    image = inner_smooth(latent, SIGMA)[0, 8:-8, 8:-8].numpy()
    advertised = fit_star(gaussian_stamp(SIGMA, 25), radius=4).sigma
    for x, y, flux in stars:
        fit = fit_star(image, x=x, y=y, radius=4)
        assert fit.sigma == pytest.approx(advertised, rel=2e-3)
        assert fit.flux == pytest.approx(flux, rel=2e-3)
        assert (fit.x, fit.y) == pytest.approx((x, y), abs=2e-3)


def test_objective_falls_and_outliers_do_not_enter() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 1.8, 2.1, 1.6], seed=1)
    visits[0].flux[44:46, 8:24] += 500.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    objectives: list[float] = []
    solution = maximum_likelihood(
        data, data.sets(), steps=120, progress=lambda step, n_steps, value: objectives.append(value)
    )
    # The accelerated steps are not monotonic, but they stay at the floor once they have reached it.
    settled = objectives[4:] + [float(solution.statistics.objective[0])]
    assert max(settled) < 0.2 * objectives[0]
    assert max(settled) < min(settled) * (1 + 1e-3)
    trail = inner_smooth(solution.latent, SIGMA)[0, 8 + 44 : 8 + 46, 8 + 8 : 8 + 24]
    assert float(trail.mean()) < 3.0


def test_saturated_cores_are_those_of_the_visits_that_see_them() -> None:
    """The two sharper of four visits are masked in a bright star's core: the others say what is there."""
    flux = 2e4
    visits = observe(LAYOUT, [(39.2, 30.3, flux)], [1.5, 1.6, 2.0, 2.1], seed=3)
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    core = np.hypot(x - 39.2, y - 30.3) < 4.0
    for visit in visits[:2]:
        visit.good[core] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets()).latent[0]
    layers = coadd_layers(data, latent)
    assert np.nanmax(np.abs(layers.residual / np.sqrt(layers.variance))) < 6.0
    box = inner_smooth(latent, SIGMA)[8 + 18 : 8 + 43, 8 + 27 : 8 + 52]
    assert float(box.sum()) == pytest.approx(flux, rel=5e-3)


def test_star_outside_the_patch_is_modelled_outside() -> None:
    """The light of a star 3 pixels beyond the border does not pile up inside it."""
    star = (LAYOUT.shape[1] + 2.0, 30.3, 5e3)
    visits = observe(LAYOUT, [star], [1.5, 1.6, 2.0, 2.1], seed=3)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    image = inner_smooth(maximum_likelihood(data, data.sets()).latent, SIGMA)[0, 8:-8, 8:-8].numpy()
    expected = gaussian_stars(LAYOUT.shape, [star], SIGMA)
    assert image[:, -3:].sum() == pytest.approx(expected[:, -3:].sum(), abs=0.05 * star[2])


def test_layers_of_a_perfect_model() -> None:
    """With the true model the residual is noise, the coadd is model plus residual, and the PSF is the
    weighted mean."""
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8], seed=5, masked_fraction=0.05)
    visits[1] = dataclasses.replace(visits[1], variance=visits[1].variance * 4)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    layers = coadd_layers(data, true_latent(data))
    weights = np.array([1.0, 0.25, 1.0])
    good = np.array([v.good for v in visits])
    flux = np.array([np.where(v.good, v.flux, 0.0) for v in visits])
    accepted = good.sum(axis=0) == layers.n_visits
    total = (weights[:, None, None] * good).sum(axis=0)
    with np.errstate(invalid="ignore"):
        expected = (weights[:, None, None] * flux).sum(axis=0) / total
    np.testing.assert_allclose(layers.coadd[accepted], expected[accepted], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        layers.variance[accepted & (layers.n_visits == 3)], (1 + 4 / 16 + 1) / 2.25**2, rtol=1e-5
    )
    mean_psf = sum(w * v.psf for w, v in zip(weights, visits, strict=True)) / weights.sum()
    np.testing.assert_allclose(layers.psf, mean_psf, atol=1e-12)
    assert np.nanmean(layers.residual) == pytest.approx(0.0, abs=0.03)
    np.testing.assert_array_equal(layers.masked, layers.n_visits < 3)
    # Visit 1 has a quarter of the variance that it claims.
    assert layers.chi2 == pytest.approx((1 + 0.25 + 1) / 3, rel=0.05)


def test_outlier_is_clipped_from_both_coadds_and_flagged() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8, 1.6], seed=6)
    visits[2].flux[50, 10:20] += 300.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = maximum_likelihood(data, data.sets()).latent[0]
    layers = coadd_layers(data, latent)
    assert layers.clipped[50, 10:20].all()
    around = np.zeros(LAYOUT.shape, dtype=bool)
    around[47:54, 7:23] = True
    assert not layers.clipped[~around].any()
    assert (layers.n_visits[50, 10:20] == 3).all()
    assert np.abs(layers.coadd[50, 10:20]).max() < 5.0


@pytest.mark.parametrize("flux", [1e8, 1e20, 1e30])
def test_a_huge_pixel_leaves_what_the_other_visits_say(flux: float) -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8, 1.6], seed=6)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = true_latent(data)
    visits[2].flux[50, 10:12] = flux
    layers = coadd_layers(data, latent)
    without = [visit for index, visit in enumerate(visits) if index != 2]
    expected = coadd_layers(PatchData(without, LAYOUT, SIGMA, margin=8), latent)
    assert layers.clipped[50, 10:12].all()
    for name in ("coadd", "residual", "variance"):
        found, wanted = getattr(layers, name)[50, 10:12], getattr(expected, name)[50, 10:12]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    assert layers.chi2 == pytest.approx(1.0, abs=0.05)


def test_a_huge_pixel_of_few_visits_has_a_finite_chi2() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0], seed=6)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    latent = true_latent(data)
    visits[1].flux[50, 10] = 1e30
    layers = coadd_layers(data, latent)
    assert np.isfinite(layers.chi2)
    assert layers.chi2 > 1e6


def test_faint_trail_is_clipped_though_no_pixel_stands_out() -> None:
    layout = CellLayout(1, 1, 80, 90)
    visits = observe(layout, [], [1.5, 2.0, 1.8, 1.6], seed=6)
    rows = np.arange(80)[:, None]
    visits[2].flux[...] += (2.5 * np.exp(-0.5 * ((rows - 40.0) / 2.0) ** 2)).astype(np.float32)
    data = PatchData(visits, layout, SIGMA, margin=8)
    layers = coadd_layers(data, torch.zeros(data.shape))
    assert layers.clipped[39:42].mean() > 0.8
    assert layers.clipped[:30].mean() == layers.clipped[50:].mean() == 0.0
    assert np.nanmean(layers.coadd[38:43]) < 0.25


def test_what_most_visits_say_is_no_outlier() -> None:
    """Where the model is wrong in all visits nothing is rejected: the residual shows it."""
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8, 1.6], seed=6)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    layers = coadd_layers(data, torch.zeros(data.shape))
    core = (slice(14, 18), slice(18, 23))
    assert not layers.clipped[core].any()
    assert (layers.n_visits[core] == 4).all()
    assert layers.residual[16, 20] > 100.0


def test_a_visit_that_ends_inside_a_cell_does_not_enter_it() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0, 1.8], seed=7)
    part = visits[1]
    visits[1] = dataclasses.replace(
        part,
        flux=part.flux[:40, 10:],
        variance=part.variance[:40, 10:],
        good=part.good[:40, 10:],
        origin=(0, 10),
    )
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    np.testing.assert_array_equal(entering_visits(data)[1], [[False, True, True], [False, False, False]])
    latent = maximum_likelihood(data, data.sets(), steps=20).latent[0]
    layers = coadd_layers(data, latent)
    assert set(np.unique(layers.n_visits[:30, 26:])) <= {2, 3}
    assert layers.n_visits[30:, :].max() == 2
    np.testing.assert_allclose(layers.psf[1, 0], (visits[0].psf[0, 0] + visits[2].psf[0, 0]) / 2, atol=1e-12)


def test_cells_without_any_visit_are_nan() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0], seed=8)
    for visit in visits:
        visit.good[30:, :26] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    layers = coadd_layers(data, maximum_likelihood(data, data.sets(), steps=20).latent[0])
    assert np.isnan(layers.psf[1, 0]).all()
    assert np.isnan(layers.coadd[30:, :26]).all()
    assert np.isfinite(layers.coadd[:30]).all()


def test_noisy_model_has_the_model_and_the_noise_of_the_visits() -> None:
    visits = observe(LAYOUT, STARS, [1.5, 2.0], seed=9, noise=3.0)
    data = PatchData(visits, LAYOUT, SIGMA, margin=8)
    truth = true_latent(data)
    white = np.ones((2, 1, 1))
    noisy = NoisyModel(visits, data, truth, seed=3, correlations=white)
    again = noisy[1]
    np.testing.assert_array_equal(again.flux, noisy[1].flux)
    assert not np.array_equal(noisy[0].flux, again.flux)
    prediction = data.visit(1).kernel.forward(truth)[8:-8, 8:-8].numpy()
    assert np.std(again.flux - prediction) == pytest.approx(3.0, rel=0.05)
    assert np.mean(again.flux - prediction) == pytest.approx(0.0, abs=0.15)


def test_local_variance() -> None:
    rng = np.random.default_rng(1)
    sigma = np.where(np.arange(200) < 100, 1.0, 3.0) * np.ones((150, 1))
    draws = [sigma * rng.standard_normal(sigma.shape) for _ in range(4)]
    estimate = local_variance(draws, np.zeros(sigma.shape), 2.0)
    assert np.median(estimate[:, :90]) == pytest.approx(1.0, rel=0.05)
    assert np.median(estimate[:, 110:]) == pytest.approx(9.0, rel=0.05)
    with pytest.raises(ValueError, match="at least one"):
        local_variance([], np.zeros(sigma.shape), 2.0)


def test_variance_of_a_star_stays_with_the_star() -> None:
    rng = np.random.default_rng(2)
    star = gaussian_stars((80, 90), [(40.0, 35.0, 1e5)], 1.0)
    sigma = np.sqrt(0.2**2 + 0.1 * star)
    estimate = local_variance([sigma * rng.standard_normal(star.shape) for _ in range(8)], star, 1.0)
    y, x = np.mgrid[:80, :90]
    ring = (np.hypot(x - 40.0, y - 35.0) > 8.0) & (np.hypot(x - 40.0, y - 35.0) < 12.0)
    assert np.median(np.sqrt(estimate[ring])) < 0.3
    assert np.sqrt(estimate[35, 40]) == pytest.approx(sigma[35, 40], rel=0.4)


def test_variance_of_a_peak_is_not_that_of_its_foot() -> None:
    """A star whose flux is known well, on uncertain surroundings."""
    rng = np.random.default_rng(3)
    star = gaussian_stars((60, 70), [(40.0, 25.0, 1e5)], 0.9)
    sigma = 0.5 + 2e-4 * star
    estimate = local_variance([sigma * rng.standard_normal(star.shape) for _ in range(8)], star, 1.0)
    assert np.sqrt(estimate[25, 40]) < 1.5 * sigma[25, 40]
    y, x = np.mgrid[:60, :70]
    foot = (np.hypot(x - 40.0, y - 25.0) > 4.0) & (np.hypot(x - 40.0, y - 25.0) < 9.0)
    assert np.median(np.sqrt(estimate[foot])) == pytest.approx(0.5, rel=0.2)


def test_variance_is_positive_where_no_realisation_has_light() -> None:
    dark = np.zeros((20, 30), dtype=np.float32)
    assert (local_variance([dark, dark], dark, 2.0) > 0.0).all()
