# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Halos of galaxies in closed form, 56 by 126 pixels, and models that lack them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.extended_light import regain_extended_light
from lsst.coadd.deepprior.finer import finer_layout, finer_observation
from lsst.coadd.deepprior.fitted_patch import RestoreSettings, fit_patch
from lsst.coadd.deepprior.noise_draws import draw_noise
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA
from lsst.coadd.deepprior.weights import packaged_network

LAYOUT = CellLayout(2, 3, 28, 42)
SIGMAS = [1.5, 1.8, 1.6, 1.7, 1.9]
SIGMA, MARGIN = 0.9, 16
HALO = 8.0
"""Sigma of the halo in pixels."""
X, Y = 70.4, 24.7


def halo(sigma: float, peak: float) -> np.ndarray:
    """Draw the halo through a PSF of some sigma, with its peak as it is without a PSF."""
    return gaussian_stars(LAYOUT.shape, [(X, Y, peak * 2.0 * np.pi * HALO**2)], np.hypot(HALO, sigma))


def with_halo(visits: list[Observation], peak: float) -> list[Observation]:
    """Add the halo to visits with the PSFs of `SIGMAS`."""
    return [
        dataclasses.replace(visit, flux=(visit.flux + halo(sigma, peak)).astype(np.float32))
        for visit, sigma in zip(visits, SIGMAS, strict=False)
    ]


def patch_of(visits: list[Observation]) -> PatchData:
    return PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)


def dark(data: PatchData) -> torch.Tensor:
    return torch.full(data.shape, 1e-6)


def image(data: PatchData, latent: torch.Tensor) -> np.ndarray:
    ny, nx = LAYOUT.shape
    return inner_smooth(latent, data.sigma)[MARGIN : MARGIN + ny, MARGIN : MARGIN + nx].numpy()


@pytest.mark.parametrize("masked_fraction", [0.0, 0.3])
@pytest.mark.parametrize("n_visits", [1, 2, 5])
def test_a_halo_comes_back(n_visits: int, masked_fraction: float) -> None:
    noise = n_visits**-0.5
    sky = observe(LAYOUT, [], SIGMAS[:n_visits], seed=3, masked_fraction=masked_fraction)
    data = patch_of(with_halo(sky, 3.0 * noise))
    back = image(data, regain_extended_light(data, data.sets(), dark(data)))
    truth = halo(SIGMA, 3.0 * noise)
    bright = truth > 1.5 * noise
    assert back[bright].sum() == pytest.approx(truth[bright].sum(), rel=0.12)
    # Smoothed by no more than the filter; a wrong axis or origin would be far off.
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    assert (back * x).sum() / back.sum() == pytest.approx(X, abs=2.0)
    assert (back * y).sum() / back.sum() == pytest.approx(Y, abs=2.0)


def test_the_sky_stays() -> None:
    data = patch_of(observe(LAYOUT, [], SIGMAS, seed=4))
    assert torch.equal(regain_extended_light(data, data.sets(), dark(data)), dark(data))


def test_an_image_with_all_light_stays() -> None:
    stars = [(19.3, 22.6, 2000.0), (99.8, 40.2, 300.0)]
    data = patch_of(with_halo(observe(LAYOUT, stars, SIGMAS, seed=5), 2.0))
    latent = maximum_likelihood(data, data.sets()).latent[0]
    assert torch.equal(regain_extended_light(data, data.sets(), latent), latent)


@pytest.mark.parametrize("n_visits", [2, 3])
def test_a_trail_in_one_visit_does_not_come_back(n_visits: int) -> None:
    visits = observe(LAYOUT, [], SIGMAS[:n_visits], seed=6)
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    trail = 4.0 * np.exp(-0.5 * ((y - 0.3 * x - 5.0) / 4.0) ** 2)
    in_one = [dataclasses.replace(visits[0], flux=visits[0].flux + trail.astype(np.float32)), *visits[1:]]
    in_all = [dataclasses.replace(visit, flux=visit.flux + trail.astype(np.float32)) for visit in visits]
    results = []
    for some in (in_one, in_all):
        data = patch_of(some)
        results.append(image(data, regain_extended_light(data, data.sets(), dark(data))).sum())
    assert results[0] < 0.01 * results[1]
    assert results[1] > 0.5 * trail.sum()


def test_a_star_that_is_missing_is_no_halo() -> None:
    """Behind the first filter it has 11 times the noise."""
    data = patch_of(observe(LAYOUT, [(X, Y, 70.0)], SIGMAS, seed=13))
    assert torch.equal(regain_extended_light(data, data.sets(), dark(data)), dark(data))


def test_the_visits_are_read_once_more_where_one_of_them_has_a_trail(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = observe(LAYOUT, [], SIGMAS, seed=6)
    visits[0].flux[20:28] += 8.0
    data = patch_of(visits)
    sets, read = data.sets(), []
    visit_of, every = data.read, range(len(SIGMAS))
    monkeypatch.setattr(data, "read", lambda some=every: read.extend(some) or visit_of(some))
    assert torch.equal(regain_extended_light(data, sets, dark(data)), dark(data))
    assert sorted(read) == sorted(2 * list(every))


def test_a_star_with_a_wrong_psf_gets_no_halo() -> None:
    visits = observe(LAYOUT, [(60.2, 28.1, 1e5)], SIGMAS, seed=7)
    narrow = observe(LAYOUT, [], [0.97 * sigma for sigma in SIGMAS])
    data = patch_of(
        [dataclasses.replace(visit, psf=other.psf) for visit, other in zip(visits, narrow, strict=True)]
    )
    latent = maximum_likelihood(data, data.sets()).latent[0]
    assert torch.equal(regain_extended_light(data, data.sets(), latent), latent)


@pytest.mark.parametrize(("missing", "comes_back"), [(0.25, True), (0.07, False)])
def test_light_within_the_errors_of_the_psfs_is_not_missing(missing: float, comes_back: bool) -> None:
    """Two per cent of the light of the model count as noise, and here are more than half of it."""
    data = patch_of(with_halo(observe(LAYOUT, [], SIGMAS, seed=14), 6.0))
    model = dark(data)
    inner = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    model[inner] += torch.as_tensor((1.0 - missing) * halo(0.0, 6.0), dtype=torch.float32)
    back = regain_extended_light(data, data.sets(), model)
    if comes_back:
        bright = halo(SIGMA, 6.0) > 3.0
        expected = halo(SIGMA, 6.0)[bright].sum()
        assert image(data, back)[bright].sum() == pytest.approx(expected, rel=0.03)
    else:
        assert torch.equal(back, model)


def test_a_halo_comes_back_where_one_of_five_visits_is() -> None:
    """The first cells of the rows have all visits, the others one."""
    visits = with_halo(observe(LAYOUT, [], SIGMAS, seed=15), 3.0)
    for visit in visits[1:]:
        visit.good[:, 42:] = False
    data = patch_of(visits)
    back = image(data, regain_extended_light(data, data.sets(), dark(data)))
    truth = halo(SIGMA, 3.0)
    bright = (truth > 1.5) & (np.arange(LAYOUT.shape[1]) > 50)
    assert back[bright].sum() == pytest.approx(truth[bright].sum(), rel=0.12)


def test_drawn_visits_hold_the_light_of_their_model() -> None:
    """The visits that noise is drawn for are dark, their model has a halo."""
    data = patch_of(observe(LAYOUT, [], SIGMAS, seed=8))
    sets = data.sets()
    model = dark(data)
    model[MARGIN:-MARGIN, MARGIN:-MARGIN] += torch.as_tensor(halo(0.0, 1.5), dtype=torch.float32)
    noisy = draw_noise(data, sets, model, 9, np.ones((len(SIGMAS), 1, 1)))
    assert noisy.is_drawn
    assert not data.is_drawn
    back = regain_extended_light(noisy, sets, dark(data))
    bright = image(data, model) > 0.8
    assert image(data, back)[bright].sum() == pytest.approx(image(data, model)[bright].sum(), rel=0.12)


def test_the_network_of_the_package_keeps_the_halo_of_a_large_galaxy() -> None:
    """Without its halo, the image has an edge at 5 times the noise of the coadd."""
    layout, noise = CellLayout(10, 11, 20, 20), 30.0
    shape, sigmas = layout.shape, [1.5, 1.7, 1.9, 2.0, 2.2]
    rng = np.random.default_rng(1)

    def galaxy(sigma: float) -> np.ndarray:
        """Two Gaussians: a bulge, and a disc whose half-light radius is 1.18 sigma."""
        parts = [(4.0, 2e5), (30.0, 1.5e6)]
        return sum(gaussian_stars(shape, [(100.4, 110.3, f)], np.hypot(s, sigma)) for s, f in parts)

    visits = [
        dataclasses.replace(
            visit,
            flux=(galaxy(sigma) + noise * rng.standard_normal(shape)).astype(np.float32),
            variance=np.full(shape, noise**2, dtype=np.float32),
        )
        for visit, sigma in zip(observe(layout, [], sigmas), sigmas, strict=True)
    ]
    settings = RestoreSettings(target_fwhm=0.9 * FWHM_PER_SIGMA, check_psf=False)
    fitted = fit_patch(visits, layout, settings, network=packaged_network())
    assert fitted.method == "pretrained network"
    restored, truth = fitted.image(fitted.points.latent), galaxy(0.9)
    for low, high in ((1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (5.0, 8.0)):
        pixels = (truth > low * fitted.noise) & (truth < high * fitted.noise)
        assert restored[pixels].sum() == pytest.approx(truth[pixels].sum(), rel=0.15), (low, high)


def test_cells_without_a_visit_stay() -> None:
    visits = with_halo(observe(LAYOUT, [], SIGMAS, seed=10), 2.0)
    for visit in visits:
        visit.psf[1, 2] = np.nan
        visit.good[28:, 84:] = False
    data = patch_of(visits)
    back = regain_extended_light(data, data.sets(), dark(data))
    far = np.s_[MARGIN + 40 : -MARGIN, MARGIN + 100 : -MARGIN]
    assert bool(torch.isfinite(back).all())
    assert torch.equal(back[far], dark(data)[far])
    assert image(data, back).max() == pytest.approx(2.0, abs=0.4)


def test_a_bright_star_in_front_leaves_no_hole() -> None:
    star = [(X + 2.0, Y, 5e3)]
    data = patch_of(with_halo(observe(LAYOUT, star, SIGMAS, seed=11), 3.0))
    truth = patch_of(with_halo(observe(LAYOUT, [], SIGMAS, seed=11), 3.0))
    only_star = maximum_likelihood(patch_of(observe(LAYOUT, star, SIGMAS, seed=11)), data.sets()).latent[0]
    back = image(data, regain_extended_light(data, data.sets(), only_star)) - image(data, only_star)
    expected = image(truth, regain_extended_light(truth, truth.sets(), dark(truth)))
    ring = np.hypot(*(np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]] - np.reshape([Y, X + 2.0], (2, 1, 1))))
    assert back[ring < 6.0].mean() == pytest.approx(expected[ring < 6.0].mean(), rel=0.1)
    too_bright = regain_extended_light(data, data.sets(), 1.1 * only_star)
    assert not torch.equal(too_bright, 1.1 * only_star)
    assert float(too_bright.min()) >= 0.0


@pytest.mark.parametrize("masked_fraction", [0.0, 0.3])
def test_a_halo_comes_back_on_finer_pixels(masked_fraction: float) -> None:
    visits = with_halo(observe(LAYOUT, [], SIGMAS, seed=12, masked_fraction=masked_fraction), 2.0)
    data = PatchData(
        [finer_observation(visit, 2) for visit in visits],
        finer_layout(LAYOUT, 2),
        2.0 * SIGMA,
        margin=2 * MARGIN,
    )
    back = inner_smooth(regain_extended_light(data, data.sets(), dark(data)), data.sigma)
    inner = back[2 * MARGIN : -2 * MARGIN, 2 * MARGIN : -2 * MARGIN].numpy()
    rebinned = inner.reshape(LAYOUT.shape[0], 2, LAYOUT.shape[1], 2).sum(axis=(1, 3))
    truth = halo(SIGMA, 2.0)
    assert rebinned[truth > 1.0].sum() == pytest.approx(truth[truth > 1.0].sum(), rel=0.12)
