# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.conditions import AXES
from lsst.coadd.deepprior.fit import make_trunk
from lsst.coadd.deepprior.fitted_patch import FittedPatch, RestoreSettings
from lsst.coadd.deepprior.network import FEATURES, Trunk, encoder_features, latent_and_slope
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import NothingToRestoreError, PatchData
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.weights import TrainedNetwork

LAYOUT = CellLayout(2, 2, 35, 45)
STARS = [(20.2, 15.7, 8000.0), (60.0, 40.4, 1000.0), (64.5, 40.0, 700.0)]
QUICK = RestoreSettings(steps=60, base_steps=80, n_splits=6, n_variance_draws=1)


@pytest.fixture(scope="module")
def restored():
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2, 1.7, 1.9, 2.0], seed=1, masked_fraction=0.02)
    visits[3].flux[58:60, 10:60] += 60.0
    return visits, restore(visits, LAYOUT, QUICK)


def test_image_is_finite_and_not_negative(restored) -> None:
    _, result = restored
    assert result.image.shape == LAYOUT.shape
    assert np.isfinite(result.image).all()
    assert result.image.min() >= 0.0


def test_one_bright_star_has_the_advertised_size(restored) -> None:
    _, result = restored
    fit = fit_star(result.image, x=20.2, y=15.7, radius=4)
    advertised = fit_star(np.pad(result.target_psf, 6), radius=4)
    assert fit.sigma == pytest.approx(advertised.sigma, rel=0.002)


def test_one_bright_star_has_its_flux_and_is_round(restored) -> None:
    _, result = restored
    fit = fit_star(result.image, x=20.2, y=15.7, radius=4)
    assert fit.flux == pytest.approx(8000.0, rel=0.01)
    assert np.hypot(fit.e1, fit.e2) < 0.002


def test_pair_is_split_that_the_coadd_blends(restored) -> None:
    """The valley between stars 4.5 pixels apart: none in the coadd, deep in the restored image."""
    _, result = restored
    x_line = np.arange(58, 67)
    assert np.argmax(result.coadd[40, x_line]) < 5
    restored_line = result.image[40, x_line]
    assert restored_line[4] < 0.5 * min(restored_line[:3].max(), restored_line[5:8].max())


def test_unmasked_trail_leaves_nothing(restored) -> None:
    visits, result = restored
    noise = np.sqrt(np.median(result.residual_variance))
    assert result.image[58:60, 10:60].mean() < 0.3 * noise
    assert result.clipped[58:60, 10:60].mean() > 0.9


def test_sky_is_quieter_than_the_coadd(restored) -> None:
    _, result = restored
    blank = gaussian_stars(LAYOUT.shape, STARS, 2.0) < 0.01
    assert result.image[blank].std() < 0.5 * np.nanstd(result.coadd[blank])


def test_model_plus_residual_has_the_flux_of_the_coadd(restored) -> None:
    _, result = restored
    box = (slice(2, 32), slice(5, 36))
    assert np.sum(result.image[box] + result.residual[box]) == pytest.approx(
        np.sum(result.coadd[box]), rel=5e-3
    )


def test_metrics_and_curves(restored) -> None:
    _, result = restored
    assert result.metrics["method"] == "network fitted from scratch"
    assert result.metrics["n_visits"] == 6
    assert result.metrics["points"] == {"tried": 3, "kept": 3}
    assert result.metrics["held_out"]["last"] < result.metrics["held_out"]["first"]
    assert result.curves["fit_step"] == [0.0, 25.0, 50.0, 60.0]
    assert len(result.curves["base_step"]) == len(result.curves["base_objective"])
    assert result.metrics["residual"]["chi2_per_pixel"] == pytest.approx(1.0, abs=0.1)


def test_same_seed_same_result_other_seed_another() -> None:
    settings = dataclasses.replace(QUICK, steps=6, base_steps=20)
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=2)
    first, second = (restore(visits, LAYOUT, settings) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.variance, second.variance)
    other = restore(visits, LAYOUT, dataclasses.replace(settings, seed=9))
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("n_visits", [1, 2, 3])
def test_few_visits(n_visits: int) -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2][:n_visits], seed=3)
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=20))
    assert np.isfinite(result.image).all()
    assert result.metrics["method"] == "network fitted from scratch"
    assert not result.clipped.any() or n_visits == 3
    assert fit_star(result.image, x=20.2, y=15.7, radius=4).flux == pytest.approx(8000.0, rel=0.02)


def test_noise_of_one_visit_is_not_learned() -> None:
    """Its halves share no noise; of halves that did, the network would keep most of what the base has."""
    visits = observe(LAYOUT, STARS, [1.8], seed=3)
    base, fitted = (restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=steps)) for steps in (0, 60))
    blank = gaussian_stars(LAYOUT.shape, STARS, 1.8) < 0.01
    assert fitted.image[blank].std() < 0.02 * base.image[blank].std()


def test_gap_keeps_the_model_and_is_flagged() -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=4)
    for visit in visits:
        visit.good[14:18, 18:23] = False
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=10))
    assert np.isfinite(result.image).all()
    assert np.isnan(result.variance[14:18, 18:23]).all()
    assert result.prior_carried[14:18, 18:23].all()
    assert (result.n_good == 0).sum() == 20


def test_visits_that_cover_a_cell_in_part_are_data() -> None:
    """One visit has the left 24 columns of the first cells, two others the rest: all of it is data."""
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=4)
    for index, columns in enumerate((slice(0, 24), slice(24, 90), slice(24, 90))):
        visit = visits[index]
        visits[index] = dataclasses.replace(
            visit,
            flux=visit.flux[:, columns],
            variance=visit.variance[:, columns],
            good=visit.good[:, columns],
            origin=(0, columns.start),
        )
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=10))
    np.testing.assert_array_equal(result.n_good[:, :24], 1)
    np.testing.assert_array_equal(result.n_good[:, 24:], 2)
    assert (result.n_good > 0).all()
    assert np.isfinite(result.variance).all()
    # The visit of the left part covers the most of the first cells and alone enters their residual coadd.
    np.testing.assert_array_equal(result.n_visits[:, 24:45], 0)
    assert np.isnan(result.residual[:, 24:45]).all()


def test_variance_of_a_saturated_core_is_not_the_error_of_convergence() -> None:
    visits = observe(LAYOUT, [(39.2, 30.3, 2e4)], [1.5, 1.6, 2.0, 2.1], seed=3)
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    core = np.hypot(x - 39.2, y - 30.3) < 4.0
    for visit in visits[:2]:
        visit.good[core] = False
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=10, base_steps=200, n_variance_draws=4))
    # The peak is 2e4 / (2 pi sigma^2), some 3500 nJy.
    assert np.sqrt(result.variance[core]).max() < 150.0
    assert len(result.noise_realizations) == 1
    assert 0.0 < np.std(result.noise_realizations[0]) < 50.0


def test_psf_stamps_of_different_sizes() -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8], seed=5, stamp=27)
    visits += observe(LAYOUT, STARS, [1.7, 2.0], seed=6, stamp=21)
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=5))
    assert result.residual_psf.shape == (2, 2, 27, 27)
    np.testing.assert_allclose(result.residual_psf.sum(axis=(2, 3)), 1.0)


def test_prior_and_data_sides_share_no_noise() -> None:
    """On visits of pure noise with masked pixels, what the encoder reads of A does not covary with the noise
    of B."""
    layout = CellLayout(1, 1, 64, 60)
    covariances = []
    for seed in range(8):
        visits = observe(layout, [], [1.6, 1.9, 1.7, 2.0], seed=20 + seed, masked_fraction=0.3)
        data = PatchData(visits, layout, 0.9)
        members = torch.tensor([[True, True, False, False]])
        features = encoder_features(maximum_likelihood(data, data.sets(members), steps=40))
        inner = (0, slice(16, -16), slice(16, -16))
        for channel in range(len(FEATURES)):
            image = features.channels[0, channel][inner[1:]].numpy()
            noise = np.where(visits[2].good & visits[3].good, visits[2].flux + visits[3].flux, 0.0) / np.sqrt(
                2
            )
            noise = np.where(np.isfinite(noise), noise, 0.0)
            covariances.append(np.mean((image - image.mean()) * noise) / image.std())
    # The standard error of one covariance is 1 / sqrt(64 * 60) = 0.016.
    assert abs(np.mean(covariances)) < 0.01
    assert np.max(np.abs(covariances)) < 0.08


def test_start_is_smooth_in_a_galaxy_and_sharp_in_a_star() -> None:
    """All steps make lumps of the noise of a galaxy, and few leave a star too wide."""
    layout, sigmas, sigma = CellLayout(1, 1, 64, 70), [1.6, 1.9, 1.7, 2.0, 1.8, 1.5], 0.9
    star, galaxy, width = (14.2, 40.7, 20000.0), (44.3, 31.2, 60000.0), 2.5
    visits = observe(layout, [star], sigmas, noise=3.0, seed=4)
    for visit, seeing in zip(visits, sigmas, strict=True):
        visit.flux[...] += gaussian_stars(layout.shape, [galaxy], math.hypot(width, seeing))
    data = PatchData(visits, layout, sigma)
    solution = maximum_likelihood(data, data.sets(), steps=240)
    features = encoder_features(solution)
    patch = tuple(slice(data.margin, data.margin + n) for n in layout.shape)
    start, all_steps, early = (
        inner_smooth(latent, sigma)[0].numpy()[patch]
        for latent in (
            latent_and_slope(features.start, features.noise)[0],
            solution.latent,
            solution.early,
        )
    )
    y, x = np.indices(layout.shape)
    truth = gaussian_stars(layout.shape, [galaxy], math.hypot(width, sigma))
    inside = np.hypot(x - galaxy[0], y - galaxy[1]) < 5.0
    errors = [np.sqrt(np.mean((image - truth)[inside] ** 2)) for image in (start, all_steps)]
    assert errors[0] < 0.5 * errors[1]
    peak = 41, 14
    assert start[peak] == pytest.approx(all_steps[peak], rel=0.02)
    assert early[peak] < 0.8 * all_steps[peak]


def test_trunk_takes_any_shape_and_starts_at_the_base() -> None:
    trunk = Trunk()
    for shape in ((33, 50), (8, 8), (41, 17)):
        correction = trunk(torch.randn(2, len(FEATURES), *shape, generator=torch.Generator().manual_seed(1)))
        assert correction.shape == (2, *shape)
        assert not bool(correction.any())


def test_latent_slope_is_the_derivative() -> None:
    z = torch.linspace(-11.0, 12.0, 50, dtype=torch.float64, requires_grad=True)
    noise = torch.full_like(z, 3.0)
    latent, slope = latent_and_slope(z, noise)
    (expected,) = torch.autograd.grad(latent.sum(), z)
    torch.testing.assert_close(slope, expected)
    assert float(latent.detach().min()) > 0.0


def test_bad_input_is_refused() -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8])
    with pytest.raises(ValueError, match="not sharper"):
        restore(visits, LAYOUT, RestoreSettings(target_fwhm=6.0))
    with pytest.raises(ValueError, match="steps"):
        RestoreSettings(steps=-1)
    with pytest.raises(ValueError, match="learning_rate"):
        RestoreSettings(learning_rate=0.0)
    with pytest.raises(NothingToRestoreError, match="no visit"):
        restore([], LAYOUT)
    for visit in visits:
        visit.psf[...] = np.nan
    with pytest.raises(NothingToRestoreError, match="PSF"):
        restore(visits, LAYOUT, QUICK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=2)
    settings = dataclasses.replace(QUICK, steps=5, base_steps=20)
    cpu, cuda = (restore(visits, LAYOUT, settings, device=device).image for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu, cuda, rtol=1e-2, atol=0.05)


def test_target_psf_is_the_advertised_gaussian() -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2])
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=0, base_steps=5, target_fwhm=2.4))
    np.testing.assert_allclose(result.target_psf, gaussian_stamp(2.4 / 2.3548200450309493))


@pytest.mark.parametrize("start", ["scratch", "trained"])
def test_a_cell_that_no_visit_sees_is_carried_by_the_prior(start: str) -> None:
    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=2)
    rows, columns = LAYOUT.cell_slice(0, 1)
    for visit in visits:
        visit.good[rows, columns] = False
        visit.psf[0, 1] = np.nan
    network = None if start == "scratch" else TrainedNetwork(Trunk(), dict.fromkeys(AXES, (-1e9, 1e9)), {})
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=5), network=network)
    assert np.isfinite(result.image).all()
    np.testing.assert_array_equal(result.n_good[rows, columns], 0)
    assert result.prior_carried[rows, columns].all()
    assert np.isnan(result.variance[rows, columns]).all()
    assert np.isfinite(result.variance[~result.prior_carried]).all()


def test_one_visit_much_sharper_than_the_others() -> None:
    """Half the median seeing is wider than its PSF: maximum likelihood at that target diverges."""
    visits = observe(LAYOUT, STARS, [1.2, 4.0, 4.2, 4.1], seed=5, stamp=41)
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=0, base_steps=240))
    assert result.metrics["residual"]["chi2_per_pixel"] < 2.0
    assert fit_star(result.image, x=20.2, y=15.7, radius=4).flux == pytest.approx(8000.0, rel=0.05)


@pytest.mark.parametrize("is_star_kept", [False, True])
def test_network_that_has_lost_the_light_is_not_used(
    is_star_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three fits end in the dark, but for the brightest star where the light of stars is kept from them."""
    seeds: list[int] = []

    def dark(seed: int, device: torch.device, dtype: torch.dtype) -> Trunk:
        seeds.append(seed)
        trunk = make_trunk(seed, device, dtype)
        with torch.no_grad():
            trunk.exit.weight.fill_(0.0)
            trunk.exit.bias.fill_(-50.0)
        return trunk

    visits = observe(LAYOUT, STARS, [1.6, 1.8, 2.2], seed=2)
    if not is_star_kept:
        monkeypatch.setattr("lsst.coadd.deepprior.network._significance", lambda *_: torch.zeros(1, 1, 1))
    settings = dataclasses.replace(QUICK, steps=4)
    base = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=0))
    monkeypatch.setattr("lsst.coadd.deepprior.scratch.make_trunk", dark)
    result = restore(visits, LAYOUT, settings)
    assert seeds == [1, 2, 3]
    assert "lost the light" in result.metrics["method"]
    np.testing.assert_array_equal(result.image, base.image)


@pytest.mark.parametrize(("full", "n_draws"), [(False, 2), (True, 1)])
def test_no_star_is_injected_where_there_is_no_room(
    full: bool, n_draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then noise is restored for the variance only, and not once more for the PSF."""
    calls = []
    drawn = FittedPatch.drawn
    monkeypatch.setattr(FittedPatch, "drawn", lambda *args: calls.append(args) or drawn(*args))
    visits = observe(LAYOUT, [], [1.6, 1.8, 1.7], seed=2)
    if full:
        for visit in visits:
            visit.flux[::8] += 300.0
            visit.flux[:, ::8] += 300.0
    result = restore(visits, LAYOUT, dataclasses.replace(QUICK, steps=0, base_steps=20))
    assert len(calls) == n_draws
    assert bool(result.metrics["psf"]["injected_stars"]) == (not full)
