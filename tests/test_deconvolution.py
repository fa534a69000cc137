# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Deconvolutions without a network on stars of known flux and PSF."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior import deconvolution
from lsst.coadd.deepprior.deconvolution import coadd_deconvolution, richardson_lucy, starlet_map
from lsst.coadd.deepprior.linear_coadds import PeerImage, inverse_variance_coadd
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp

LAYOUT = CellLayout(1, 2, 60, 44)
SIGMA = 0.9
SEEING = [1.3, 1.5, 1.8, 2.0]
STAR = (52.3, 21.6, 5000.0)


def last_of_richardson_lucy(observations: list[Observation], layout: CellLayout, sigma: float) -> PeerImage:
    return richardson_lucy(observations, layout, sigma, steps=[200])[200]


def weak_starlet_map(observations: list[Observation], layout: CellLayout, sigma: float) -> PeerImage:
    return starlet_map(observations, layout, sigma, strength=1.0, steps=20)


def last_of_coadd_deconvolution(
    observations: list[Observation], layout: CellLayout, sigma: float
) -> PeerImage:
    return coadd_deconvolution(observations, layout, sigma, steps=[300])[300]


METHODS = [last_of_richardson_lucy, weak_starlet_map, last_of_coadd_deconvolution]


@pytest.mark.parametrize("method", METHODS)
def test_star_comes_out_at_the_target(method: Callable[..., PeerImage]) -> None:
    """Flux, place and size of a bright star; four visits, unequal stamps, one visit ends early."""
    visits = observe(LAYOUT, [STAR], SEEING[:2]) + observe(LAYOUT, [STAR], SEEING[2:], seed=5, stamp=33)
    part = (slice(4, 60), slice(10, 88))
    visits[1] = dataclasses.replace(
        visits[1],
        flux=visits[1].flux[part],
        variance=visits[1].variance[part],
        good=visits[1].good[part],
        origin=(4, 10),
    )
    peer = method(visits, LAYOUT, SIGMA)
    assert peer.image.shape == LAYOUT.shape
    assert peer.image.dtype == np.float32
    np.testing.assert_allclose(peer.psf, gaussian_stamp(SIGMA))
    star = fit_star(peer.image, x=52, y=22, radius=4)
    assert star.x == pytest.approx(STAR[0], abs=0.02)
    assert star.y == pytest.approx(STAR[1], abs=0.02)
    # The steps on the coadd are slow: the star is still too wide, but far from the 1.6 of the coadd.
    assert star.sigma == pytest.approx(SIGMA, rel=0.12 if method is last_of_coadd_deconvolution else 0.04)
    assert peer.image[12:32, 42:63].sum() == pytest.approx(STAR[2], rel=0.02)
    assert peer.image.min() >= 0.0


@pytest.mark.parametrize("method", METHODS)
def test_masked_pixels_do_no_harm(method: Callable[..., PeerImage]) -> None:
    visits = observe(LAYOUT, [STAR], SEEING, masked_fraction=0.1)
    peer = method(visits, LAYOUT, SIGMA)
    assert np.isfinite(peer.image).all()
    assert peer.image[12:32, 42:63].sum() == pytest.approx(STAR[2], rel=0.02)


@pytest.mark.parametrize("method", [last_of_richardson_lucy, weak_starlet_map])
def test_outlier_of_one_visit_stays_out(method: Callable[..., PeerImage]) -> None:
    """Of an unmasked streak of 30 sigma in one of four visits, less than the Huber threshold is left."""
    visits = observe(LAYOUT, [], SEEING)
    streaked = visits[0].flux.copy()
    streaked[40] += 30.0
    visits[0] = dataclasses.replace(visits[0], flux=streaked)
    assert method(visits, LAYOUT, SIGMA).image[38:43].sum(axis=0).mean() < 4.0
    assert inverse_variance_coadd(visits, LAYOUT, SIGMA).image[38:43].sum(axis=0).mean() > 6.0


@pytest.mark.parametrize("method", METHODS)
def test_psf_that_varies_from_cell_to_cell(method: Callable[..., PeerImage]) -> None:
    """The same star in two cells of unequal PSFs comes out with the same size and flux."""
    left, right = (21.4, 30.2, 5000.0), (67.4, 30.2, 5000.0)
    visits = observe(LAYOUT, [left], [1.3, 1.6])
    for index, wide in enumerate([1.6, 1.9]):
        other = observe(LAYOUT, [right], [wide], noiseless=True)[0]
        psf = visits[index].psf.copy()
        psf[0, 1] = other.psf[0, 1]
        visits[index] = dataclasses.replace(visits[index], flux=visits[index].flux + other.flux, psf=psf)
    image = method(visits, LAYOUT, SIGMA).image
    sizes = [fit_star(image, x=round(x), y=30, radius=4).sigma for x in (left[0], right[0])]
    fluxes = [image[20:41, round(x) - 10 : round(x) + 11].sum() for x in (left[0], right[0])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.07)
    assert fluxes == pytest.approx([5000.0, 5000.0], rel=0.02)


@pytest.mark.parametrize("method", [richardson_lucy, coadd_deconvolution])
def test_one_run_gives_the_image_of_every_number_of_steps(
    method: Callable[..., dict[int, PeerImage]],
) -> None:
    visits = observe(LAYOUT, [STAR], SEEING)
    both = method(visits, LAYOUT, SIGMA, steps=[45, 5])
    assert sorted(both) == [5, 45]
    for steps, peer in both.items():
        np.testing.assert_array_equal(peer.image, method(visits, LAYOUT, SIGMA, steps=[steps])[steps].image)
    widths = [fit_star(both[steps].image, x=52, y=22, radius=5).sigma for steps in (5, 45)]
    assert widths[0] > 1.05 * widths[1]


def test_no_data_is_nan() -> None:
    """Only what no visit comes near is unknown to a model; the coadd has no pixel that is masked."""
    visits = observe(LAYOUT, [STAR], [1.3, 1.6])
    for index, visit in enumerate(visits):
        psf = visit.psf.copy()
        psf[0, 0] = np.nan
        good = visit.good.copy()
        good[30:32, 60:62] = False
        visits[index] = dataclasses.replace(visit, psf=psf, good=good)
    model = richardson_lucy(visits, LAYOUT, SIGMA, steps=[20])[20].image
    assert np.isnan(model[:, :30]).all()
    assert np.isfinite(model[:, 44:]).all()
    coadd = coadd_deconvolution(visits, LAYOUT, SIGMA, steps=[20])[20].image
    assert np.isnan(coadd[:, :44]).all()
    assert np.isnan(coadd[30:32, 60:62]).all()
    assert np.isnan(coadd).sum() == 60 * 44 + 4


def test_starlet_scales_add_up_and_their_transpose_is_one() -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(70, 50, generator=generator, dtype=torch.float64)
    scales = deconvolution._starlet(image)
    coarse = image
    for scale in range(len(scales)):
        coarse = deconvolution._smooth(coarse, scale)
    torch.testing.assert_close(scales.sum(dim=0) + coarse, image)
    other = torch.randn(scales.shape, generator=generator, dtype=torch.float64)
    forward, transpose = (scales * other).sum(), (image * deconvolution._starlet_transpose(other)).sum()
    torch.testing.assert_close(forward, transpose)
    assert scales.norm() <= image.norm()
    # A pixel becomes the B3 spline: 1 - (3/8)^2 of it is left in the finest scale.
    probe = torch.zeros(9, 9)
    probe[4, 4] = 1.0
    assert float(deconvolution._starlet(probe)[0, 4, 4]) == pytest.approx(1.0 - 0.375**2)


def test_noise_of_scales_is_that_of_simulated_gradients() -> None:
    layout = CellLayout(1, 1, 128, 150)
    visits = observe(layout, [], [1.3, 1.9], noise=2.0)
    data = PatchData(visits, layout, SIGMA, huber_delta=100.0)
    sets = data.sets()
    expected = deconvolution._scale_noise(sets)[:, 80, 91]
    # At a model of zero the matched image is the gradient.
    matched = data.linearise(sets, torch.zeros((1, *data.shape))).matched[0]
    measured = deconvolution._starlet(matched)[:, 40:-40, 40:-40].std(dim=(-2, -1))
    # Wide scales have few independent pixels.
    np.testing.assert_allclose(measured[:3] / expected[:3], 1.0, atol=0.12)


def test_prior_takes_away_noise() -> None:
    visits = observe(LAYOUT, [STAR], SEEING)
    rms = []
    for strength in (0.0, 1.0, 4.0):
        image = starlet_map(visits, LAYOUT, SIGMA, strength=strength, steps=30).image
        rms.append(float(image[:, :35].std()))
    assert rms[0] > 1.3 * rms[1] > 1.3 * 1.3 * rms[2]


def test_starlet_prox_is_the_minimum() -> None:
    """No small change that keeps u >= 0 lowers the objective of the proximal operator."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(30, 22, generator=generator, dtype=torch.float64) + 0.5
    bound = torch.full((deconvolution._SCALES, 30, 22), 0.3, dtype=torch.float64)
    curvature = 2.0

    def objective(u: torch.Tensor) -> float:
        coefficients = deconvolution._starlet(deconvolution.inner_smooth(u, SIGMA))
        return float(0.5 * curvature * (u - target).square().sum() + (bound * coefficients.abs()).sum())

    dual = torch.zeros_like(bound)
    for _ in range(150):
        u, dual = deconvolution._starlet_prox(target, dual, bound, curvature, SIGMA)
    assert float(u.min()) == 0.0
    best = objective(u)
    assert best < objective(target.clamp_min(0.0))
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            change = torch.randn(u.shape, generator=generator, dtype=torch.float64)
            assert objective((u + size * change).clamp_min(0.0)) > best - 1e-4 * abs(best)


def test_coadd_deconvolution_stops_by_itself_and_keeps_to_footprints() -> None:
    visits = observe(LAYOUT, [STAR], SEEING)
    ((steps, peer),) = coadd_deconvolution(visits, LAYOUT, SIGMA).items()
    assert 12 <= steps <= 100
    np.testing.assert_array_equal(
        peer.image, coadd_deconvolution(visits, LAYOUT, SIGMA, steps=[steps])[steps].image
    )
    assert peer.image[:, :30].max() == 0.0
    everywhere = coadd_deconvolution(visits, LAYOUT, SIGMA, steps=[steps], footprints=False)[steps].image
    assert everywhere[:, :30].max() > 0.0
    truth = gaussian_stars(LAYOUT.shape, [STAR], SIGMA)
    coadd = inverse_variance_coadd(visits, LAYOUT, SIGMA).image
    assert np.abs(peer.image - truth).sum() < 0.5 * np.abs(coadd - truth).sum()


def test_bad_input() -> None:
    visits = observe(LAYOUT, [STAR], [1.3])
    nothing = [dataclasses.replace(visits[0], good=np.zeros(LAYOUT.shape, dtype=bool))]
    for method in (richardson_lucy, coadd_deconvolution):
        for steps in ([], [0, 3]):
            with pytest.raises(ValueError, match="positive numbers of steps"):
                method(visits, LAYOUT, SIGMA, steps=steps)
        with pytest.raises(ValueError, match="good pixel"):
            method(nothing, LAYOUT, SIGMA, steps=[3])
    with pytest.raises(ValueError, match="not be negative"):
        starlet_map(visits, LAYOUT, SIGMA, strength=-1.0)
    with pytest.raises(ValueError, match="positive numbers of steps"):
        starlet_map(visits, LAYOUT, SIGMA, strength=1.0, steps=0)
