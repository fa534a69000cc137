# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Plain coadd, best visit and proper coadd against closed forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.linear_coadds import (
    PeerImage,
    best_seeing_visit,
    inverse_variance_coadd,
    proper_coadd,
)
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout

LAYOUT = CellLayout(2, 3, 44, 36)
SIGMA = 0.8
METHODS = [inverse_variance_coadd, best_seeing_visit, proper_coadd]


def cut(visit: Observation, y: slice, x: slice) -> Observation:
    """Return a part of a visit that covers the whole patch."""
    return dataclasses.replace(
        visit,
        flux=visit.flux[y, x],
        variance=visit.variance[y, x],
        good=visit.good[y, x],
        origin=(y.start, x.start),
    )


def with_psf(visit: Observation, cells: tuple[slice, slice], psf: np.ndarray | float) -> Observation:
    """Return a visit with other PSFs in some cells."""
    stamps = visit.psf.copy()
    stamps[cells] = psf
    return dataclasses.replace(visit, psf=stamps)


def star_error(peer: PeerImage, x: int, y: int, flux: float) -> float:
    """Return the largest deviation of a star from flux times PSF, as a part of its peak."""
    half = min(12, peer.psf.shape[0] // 2)
    middle = peer.psf.shape[0] // 2
    stamp = flux * peer.psf[middle - half : middle + half + 1, middle - half : middle + half + 1]
    box = peer.image[y - half : y + half + 1, x - half : x + half + 1]
    return float(np.abs(box - stamp).max() / stamp.max())


def test_coadd_is_the_weighted_mean_of_what_is_good() -> None:
    noises = [1.0, 2.0, 0.5]
    visits = [
        observe(LAYOUT, [], [sigma], noise=noise, seed=seed, masked_fraction=0.2)[0]
        for seed, (sigma, noise) in enumerate(zip([1.3, 1.7, 2.1], noises, strict=True))
    ]
    peer = inverse_variance_coadd(visits, LAYOUT, SIGMA)
    weight = np.array([v.good / noise**2 for v, noise in zip(visits, noises, strict=True)])
    flux = np.array([np.nan_to_num(v.flux) for v in visits])
    with np.errstate(invalid="ignore"):
        expected = (weight * flux).sum(axis=0) / weight.sum(axis=0)
    assert np.isnan(expected).any()
    assert peer.image.dtype == np.float32
    np.testing.assert_allclose(peer.image, expected, rtol=1e-5, atol=1e-6)
    inverse = np.array(noises) ** -2.0
    np.testing.assert_allclose(
        peer.psf, np.tensordot(inverse, [v.psf[0, 0] for v in visits], 1) / inverse.sum(), atol=1e-12
    )


def test_a_visit_that_ends_in_a_cell_does_not_enter_it() -> None:
    visits = observe(LAYOUT, [], [1.3, 1.7])
    # Rows 10 on and columns 50 on: whole cells are (1, 2) only.
    visits[1] = cut(visits[1], slice(10, 88), slice(50, 108))
    image = inverse_variance_coadd(visits, LAYOUT, SIGMA).image
    np.testing.assert_allclose(image[:44], visits[0].flux[:44], atol=1e-6)
    np.testing.assert_allclose(image[44:, :72], visits[0].flux[44:, :72], atol=1e-6)
    mean = 0.5 * (visits[0].flux[44:, 72:] + visits[1].flux[34:, 22:])
    np.testing.assert_allclose(image[44:, 72:], mean, atol=1e-6)


def test_best_visit_covers_the_patch() -> None:
    visits = observe(LAYOUT, [], [1.2, 1.5, 1.9], masked_fraction=0.1)
    visits[0] = cut(visits[0], slice(0, 88), slice(0, 90))
    peer = best_seeing_visit(visits, LAYOUT, SIGMA)
    np.testing.assert_array_equal(peer.image, visits[1].flux)
    np.testing.assert_allclose(peer.psf, visits[1].psf[0, 1])
    # Without a visit that covers it all, the one that covers the most.
    visits[1] = cut(visits[1], slice(20, 88), slice(0, 108))
    visits[2] = cut(visits[2], slice(0, 60), slice(0, 108))
    image = best_seeing_visit(visits, LAYOUT, SIGMA).image
    np.testing.assert_array_equal(image[:, :90], visits[0].flux)
    assert np.isnan(image[:, 90:]).all()


def test_best_visit_has_good_pixels_in_the_cells_that_it_covers() -> None:
    visits = observe(LAYOUT, [], [1.2, 1.5])
    visits[0].good[44:, 72:] = False
    np.testing.assert_array_equal(best_seeing_visit(visits, LAYOUT, SIGMA).image, visits[1].flux)


@pytest.mark.parametrize("method", METHODS)
def test_psf_is_that_of_the_central_cell(method: Callable[..., PeerImage]) -> None:
    layout = CellLayout(3, 5, 30, 24)
    visits = observe(layout, [], [1.6])
    (narrow,) = observe(layout, [], [1.3])
    visits[0] = with_psf(visits[0], np.s_[1, 2], narrow.psf[1, 2])
    psf = method(visits, layout, SIGMA).psf
    half, middle = 5, psf.shape[0] // 2
    inner = psf[middle - half : middle + half + 1, middle - half : middle + half + 1]
    np.testing.assert_allclose(
        inner, narrow.psf[1, 2][13 - half : 14 + half, 13 - half : 14 + half], atol=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_star_is_flux_times_psf(method: Callable[..., PeerImage]) -> None:
    """Stamps of unequal sizes and noises, and a PSF that is not symmetric."""
    visits = [
        *observe(LAYOUT, [(50, 40, 1000.0)], [1.3], stamp=27, noiseless=True),
        *observe(LAYOUT, [(50, 40, 1000.0)], [1.9], stamp=33, noise=0.6, noiseless=True),
    ]
    lopsided = gaussian_stars((27, 27), [(13, 13, 0.7), (15, 12, 0.3)], 1.3)
    image = gaussian_stars(LAYOUT.shape, [(50, 40, 700.0), (52, 39, 300.0)], 1.3).astype(np.float32)
    visits[0] = dataclasses.replace(with_psf(visits[0], np.s_[:, :], lopsided / lopsided.sum()), flux=image)
    peer = method(visits, LAYOUT, SIGMA)
    assert peer.psf.sum() == pytest.approx(1.0)
    assert star_error(peer, 50, 40, 1000.0) < 1e-3
    assert peer.image.sum() == pytest.approx(1000.0, rel=2e-3)


def test_proper_coadd_of_equal_visits_is_their_mean() -> None:
    """A symmetric PSF of positive transfer has no phase for the whitening to change."""
    visits = observe(LAYOUT, [(50.3, 40.2, 500.0)], [1.6] * 4)
    peer = proper_coadd(visits, LAYOUT, SIGMA)
    mean = np.mean([v.flux for v in visits], axis=0)
    np.testing.assert_allclose(peer.image, mean, atol=2e-3)


def test_noise_of_the_proper_coadd_is_white_and_that_of_the_coadd_is_not_exceeded() -> None:
    """Across unequal PSFs, also from cell to cell, and unequal noises."""
    layout = CellLayout(2, 1, 96, 160)
    visits = [
        observe(layout, [], [sigma], noise=noise, seed=seed)[0]
        for seed, (sigma, noise) in enumerate([(1.2, 1.0), (1.8, 0.7), (2.4, 0.5), (1.5, 2.0)])
    ]
    visits[0] = with_psf(visits[0], np.s_[1, :], observe(layout, [], [1.35])[0].psf[0, 0])
    image = proper_coadd(visits, layout, SIGMA).image
    variance = 1.0 / sum(v.variance[0, 0] ** -1.0 for v in visits)
    power = np.abs(np.fft.fft2(image)) ** 2 / image.size / variance
    radius = np.hypot(np.fft.fftfreq(192)[:, None], np.fft.fftfreq(160)[None, :])
    for low, high in [(0.02, 0.12), (0.12, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.8)]:
        ring = power[(radius >= low) & (radius < high)]
        # Pairs of frequencies are the same number, so the relative error of the mean is (2 / n)^1/2.
        assert ring.mean() == pytest.approx(1.0, abs=4 * np.sqrt(2.0 / ring.size))


@pytest.mark.parametrize("lopsided", [False, True])
def test_proper_coadd_is_sharper_and_deeper_for_points(lopsided: bool) -> None:
    """The matched filter of the proper coadd has the summed information of the visits; the coadd has less."""
    visits = observe(LAYOUT, [], [1.1, 2.2, 2.6])
    if lopsided:
        psf = gaussian_stars((27, 27), [(13, 13, 0.7), (16, 11, 0.3)], 1.1)
        visits[0] = with_psf(visits[0], np.s_[:, :], psf / psf.sum())
    plain, proper = (method(visits, LAYOUT, SIGMA) for method in (inverse_variance_coadd, proper_coadd))
    information = sum((v.psf[0, 0] ** 2).sum() for v in visits)
    # Both coadds have white noise of variance 1/3 here.
    assert 3 * (proper.psf**2).sum() == pytest.approx(information, rel=1e-3)
    assert 3 * (plain.psf**2).sum() < 0.95 * information


def test_proper_coadd_fills_masked_pixels_and_missing_boxes() -> None:
    stars = [(30.0, 25.0, 800.0), (80.0, 60.0, 400.0)]
    visits = observe(LAYOUT, stars, [1.6] * 5, noiseless=True, masked_fraction=0.05)
    visits[3] = cut(visits[3], slice(0, 60), slice(0, 108))
    peer = proper_coadd(visits, LAYOUT, SIGMA)
    truth = gaussian_stars(LAYOUT.shape, stars, 1.6)
    assert np.isfinite(peer.image).all()
    np.testing.assert_allclose(peer.image, truth, atol=2e-3 * truth.max())


@pytest.mark.parametrize("method", [inverse_variance_coadd, proper_coadd])
def test_no_data_is_nan_and_a_cell_without_psf_is_left_out(method: Callable[..., PeerImage]) -> None:
    visits = observe(LAYOUT, [(20.0, 60.0, 300.0)], [1.3, 1.8])
    for index, visit in enumerate(visits):
        good = visit.good.copy()
        good[5:9, 70:77] = False
        visits[index] = dataclasses.replace(with_psf(visit, np.s_[0, 1], np.nan), good=good)
    peer = method(visits, LAYOUT, SIGMA)
    missing = np.zeros(LAYOUT.shape, dtype=bool)
    missing[:44, 36:72] = True
    missing[5:9, 70:77] = True
    np.testing.assert_array_equal(np.isnan(peer.image), missing)
    assert np.isfinite(peer.psf).all()


@pytest.mark.parametrize("method", METHODS)
def test_bad_input(method: Callable[..., PeerImage]) -> None:
    visits = observe(LAYOUT, [], [1.3])
    nothing = dataclasses.replace(visits[0], good=np.zeros(LAYOUT.shape, dtype=bool))
    with pytest.raises(ValueError, match="good pixel"):
        method([nothing], LAYOUT, SIGMA)
    with pytest.raises(ValueError, match="outside the patch"):
        method([dataclasses.replace(visits[0], origin=(3, 0))], LAYOUT, SIGMA)
