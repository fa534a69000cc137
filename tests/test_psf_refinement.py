# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from toy import gaussian_stars, observe

from lsst.coadd.deepprior import psf_refinement
from lsst.coadd.deepprior.finer import finer_layout, finer_observation
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import NothingToRestoreError, PatchData
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, StarFit, fit_star, target_sigma
from lsst.coadd.deepprior.psf_basis import PsfBasis, reference_sigma
from lsst.coadd.deepprior.psf_refinement import CorrectedObservations, PsfRefinement, refine_psfs, summary
from lsst.coadd.deepprior.psf_sky import RefinementSky
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.coadd.deepprior.tasks.execution import refined_observations

LAYOUT = CellLayout(1, 2, 96, 64)
SEEING = [1.7, 1.9, 2.2, 1.8]
STAMP = 31
STARS = [
    (18.3, 20.6, 6000.0),
    (45.1, 70.2, 9000.0),
    (70.7, 25.4, 4000.0),
    (92.2, 66.8, 7000.0),
    (110.4, 22.3, 5000.0),
    (24.9, 49.5, 3000.0),
    (68.0, 49.0, 8000.0),
]
GALAXY = (110.0, 75.0, 9000.0)


def _stamp(sigma: float, ellipticity: float = 0.0) -> np.ndarray:
    middle = STAMP // 2
    stamp = gaussian_stars((STAMP, STAMP), [(middle, middle, 1.0)], sigma, ellipticity)
    return np.broadcast_to(stamp / stamp.sum(), (1, 2, STAMP, STAMP)).copy()


def _visits(stars: list[tuple[float, float, float]] = STARS) -> list[Observation]:
    """Stars, and a galaxy that is brighter than most of them."""
    visits = observe(LAYOUT, stars, SEEING, seed=3, stamp=STAMP, masked_fraction=0.01)
    for visit, sigma in zip(visits, SEEING, strict=True):
        visit.flux[...] += gaussian_stars(LAYOUT.shape, [GALAXY], np.hypot(sigma, 1.0))
    return visits


def _errors(refinement: PsfRefinement, sigmas: list[float] = SEEING) -> tuple[np.ndarray, np.ndarray]:
    """Return the relative errors of the sizes, and of the ellipticities of round PSFs."""
    fits = [shape for shape in refinement.after if shape is not None]
    assert len(fits) == len(sigmas)
    size = np.array([fit.sigma / sigma - 1.0 for fit, sigma in zip(fits, sigmas, strict=True)])
    return size, np.array([np.hypot(fit.e1, fit.e2) for fit in fits])


def _check(refinement: PsfRefinement) -> None:
    for stamps in refinement.stamps:
        assert stamps.min() >= 0.0
        np.testing.assert_allclose(stamps.sum(axis=(2, 3)), 1.0)
        y, x = np.mgrid[:STAMP, :STAMP] - STAMP // 2
        np.testing.assert_allclose([(stamps * g).sum(axis=(2, 3)) for g in (x, y)], 0.0, atol=5e-3)
    assert refinement.flux_scale.mean() == pytest.approx(1.0)
    np.testing.assert_allclose(refinement.shift.mean(axis=0), 0.0, atol=1e-9)
    assert refinement.background.mean() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("wider", "ellipticity"), [(1.05, 0.0), (1.0, 0.015), (1.0, 0.0)])
def test_psfs_that_are_wrong_become_right_and_others_stay(wider: float, ellipticity: float) -> None:
    """Stamps 5 % too wide, of ellipticity 0.03, and right; the galaxy must not be taken for a star."""
    visits = [
        dataclasses.replace(visit, psf=_stamp(wider * sigma, ellipticity))
        for visit, sigma in zip(_visits(), SEEING, strict=True)
    ]
    refinement = refine_psfs(visits, LAYOUT)
    assert refinement.anchored
    assert len(refinement.stars) >= 5
    assert np.hypot(*(refinement.stars - GALAXY[1::-1]).T).min() > 3.0
    size, round_to = _errors(refinement)
    assert np.abs(size).max() < 0.01
    assert round_to.max() < 0.005
    assert refinement.fwhm_error.max() < 0.01
    assert (round_to < 5.0 * refinement.ellipticity_error).all()
    assert refinement.ellipticity_error.max() < 0.01
    assert (refinement.ellipticity_error > 2e-4).all()
    assert not any(refinement.flags(k)[flag] for k in range(4) for flag in ("not_anchored", "uncertain"))
    _check(refinement)


def test_a_star_with_a_fainter_companion_does_not_tell_the_psf() -> None:
    """One of a tenth of its flux, 1.5 FWHM away; one of a hundredth is too faint to matter."""
    (x, y, flux), (other_x, other_y, other_flux), *_ = STARS
    companions = [(x + 6.5, y, 0.1 * flux), (other_x, other_y - 6.5, 0.01 * other_flux)]
    visits = observe(LAYOUT, STARS + companions, SEEING, seed=3, stamp=STAMP)
    data = PatchData(visits, LAYOUT, target_sigma(2.35 * np.array(SEEING)))
    sky = RefinementSky(data, PsfBasis(reference_sigma(data.seeing)), base_steps=100)
    distance = np.hypot(*(sky.stars[:, None, 1::-1] - data.margin - np.array(STARS)[:, :2]).T)
    assert list(distance.min(axis=1) < 1.0) == [False] + [True] * (len(STARS) - 1)


@pytest.mark.parametrize(
    ("snrs", "anchored"),
    [([400.0] * 5, True), ([400.0] * 4, False), ([400.0] * 4 + [53.0], True), ([400.0] * 4 + [43.0], False)],
)
def test_five_stars_of_signal_to_noise_50_anchor(snrs: list[float], anchored: bool) -> None:
    layout, seeing = CellLayout(1, 1, 76, 80), SEEING[:3]
    noise = 1.0 / np.sqrt(np.sum(1.0 / (4.0 * np.pi * np.square(seeing))))
    places = [(16.3, 18.6), (40.1, 58.2), (62.7, 20.4), (18.2, 54.8), (60.4, 50.3)]
    stars = [(x, y, snr * noise) for (x, y), snr in zip(places, snrs, strict=False)]
    refinement = refine_psfs(observe(layout, stars, seeing, seed=3, stamp=23), layout, base_steps=20)
    assert refinement.anchored == anchored
    assert len(refinement.stars) == (5 if anchored else 0)
    assert refinement.n_candidates == sum(snr > 50.0 for snr in snrs)
    for visit in range(3):
        assert refinement.flags(visit)["not_anchored"] == (not anchored)


def test_guesses_of_the_seeing_are_enough_with_stars() -> None:
    guesses = [1.12, 0.93, 0.88, 1.05]
    visits = [
        dataclasses.replace(visit, psf=_stamp(guess * sigma, 0.1))
        for visit, sigma, guess in zip(_visits(), SEEING, guesses, strict=True)
    ]
    refinement = refine_psfs(visits, LAYOUT, blind=True)
    assert refinement.anchored
    size, round_to = _errors(refinement)
    assert np.abs(size).max() < 0.02
    assert round_to.max() < 0.01
    assert refinement.flags(0)["large_change"]
    _check(refinement)


def test_flux_scale_shift_and_background_are_found() -> None:
    rng = np.random.default_rng(5)
    scale = 1.0 + rng.normal(0.0, 0.03, 4)
    shift, background = rng.normal(0.0, 0.15, (4, 2)), rng.normal(0.0, 0.3, 4)
    scale, shift, background = (
        scale / scale.mean(),
        shift - shift.mean(axis=0),
        background - background.mean(),
    )
    visits = []
    for k, visit in enumerate(_visits()):
        moved = [(x + shift[k, 0], y + shift[k, 1], flux) for x, y, flux in STARS]
        (clean,) = observe(LAYOUT, moved, SEEING[k : k + 1], seed=20 + k, stamp=STAMP)
        flux = (scale[k] * clean.flux + background[k]).astype(np.float32)
        visits.append(
            dataclasses.replace(
                visit, flux=flux, good=clean.good, variance=clean.variance * scale[k] ** 2, noise=clean.flux
            )
        )
    refinement = refine_psfs(visits, LAYOUT)
    np.testing.assert_allclose(refinement.flux_scale, scale, atol=0.012)
    np.testing.assert_allclose(refinement.shift, shift, atol=0.01)
    np.testing.assert_allclose(refinement.background, background, atol=0.05)
    corrected = CorrectedObservations(visits, refinement)
    assert len(corrected) == 4
    one = corrected[1]
    np.testing.assert_allclose(
        one.flux * refinement.flux_scale[1] + refinement.background[1], visits[1].flux, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(one.variance * refinement.flux_scale[1] ** 2, visits[1].variance, rtol=1e-5)
    assert one.noise is not None
    np.testing.assert_allclose(one.noise * refinement.flux_scale[1], visits[1].noise, rtol=1e-5)
    assert abs(refinement.flux_scale[1] - 1.0) > 1e-3
    fit = fit_star(one.psf[0, 0])
    np.testing.assert_allclose((fit.x, fit.y), STAMP // 2 + refinement.shift[1], atol=0.01)
    np.testing.assert_array_equal(one.good, visits[1].good)


def test_without_stars_only_differences_are_refined() -> None:
    """All stamps are 5 % too wide, and one 6 % more."""
    sources = [(x, y, flux) for x, y, flux in STARS]
    visits = observe(LAYOUT, [], SEEING, seed=4, stamp=STAMP)
    wider = [1.05, 1.05, 1.11, 1.05]
    for k, (visit, sigma) in enumerate(zip(visits, SEEING, strict=True)):
        for number, source in enumerate(sources):
            wide = np.hypot(sigma, 1.5 + 0.3 * number)
            visit.flux[...] += gaussian_stars(LAYOUT.shape, [source], wide, 0.1)
        visits[k] = dataclasses.replace(visit, psf=_stamp(wider[k] * sigma))
    refinement = refine_psfs(visits, LAYOUT)
    assert not refinement.anchored
    assert len(refinement.stars) == 0
    assert refinement.flags(0) == {"not_anchored": True, "large_change": False, "uncertain": True}
    size, _ = _errors(refinement)
    assert size.mean() == pytest.approx(np.mean(wider) - 1.0, abs=0.003)
    assert np.ptp(size) < 0.03
    _check(refinement)


@pytest.mark.parametrize("sharp", [1.32, 1.9])
def test_the_sky_has_the_target_that_is_asked_for(sharp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the best seeing is too sharp for the default one."""
    visits = observe(LAYOUT, STARS, [sharp / FWHM_PER_SIGMA, 1.7], seed=3, stamp=STAMP)
    sigmas = []

    def first_pass(data: PatchData, *arguments: object) -> None:
        sigmas.append(data.sigma)
        raise StopIteration

    monkeypatch.setattr(psf_refinement, "RefinementSky", first_pass)
    with pytest.raises(StopIteration):
        refined_observations(
            DeepPriorCoaddConfig(psf_mode="refine"),
            visits,
            LAYOUT,
            RestoreSettings(target_fwhm=1.8),
            "cpu",
            lambda *arguments: None,
        )
    assert sigmas == [pytest.approx(1.8 / FWHM_PER_SIGMA)]


def test_mean_shape_is_that_of_the_start() -> None:
    """Along both directions of the ellipticity, which are not equal."""
    wanted = [StarFit(1.0, 0.0, 0.0, 1.02 * sigma, 0.04, -0.02) for sigma in SEEING]
    basis = PsfBasis(reference_sigma(2.35 * np.array(SEEING)))
    total = np.zeros((4, basis.n_parameters))
    used = np.array([True, True, False, True])
    stamps = psf_refinement._with_mean_shape([_stamp(sigma) for sigma in SEEING], wanted, basis, total, used)
    np.testing.assert_array_equal(stamps[2], _stamp(SEEING[2]))
    shapes = [fit_star(stamps[k][0, 0], radius=7) for k in np.flatnonzero(used)]
    assert np.mean([shape.e1 for shape in shapes]) == pytest.approx(0.04, abs=5e-3)
    assert np.mean([shape.e2 for shape in shapes]) == pytest.approx(-0.02, abs=5e-3)
    ratios = [shape.sigma / sigma for shape, sigma in zip(shapes, np.array(SEEING)[used], strict=True)]
    assert np.mean(ratios) == pytest.approx(1.02, abs=3e-3)
    assert total[used].any(axis=1).all()
    assert not total[2].any()


def test_stars_that_fail_a_later_pass_keep_what_they_told(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    class LosesItsStars(RefinementSky):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            passes.append(self.anchored)
            if len(passes) == 2:
                self.anchored, self.stars = False, self.stars[:0]

    monkeypatch.setattr(psf_refinement, "RefinementSky", LosesItsStars)
    refinement = refine_psfs(_visits(), LAYOUT, base_steps=30)
    assert passes == [True, True]
    assert refinement.anchored
    assert len(refinement.stars) >= 5


def _spoilt_visits(scale: float = 30.0) -> list[Observation]:
    """Visits with a noise of ``scale`` nJy: the second has a trail over a star, the third has lost a core."""
    visits = []
    y, x = np.indices(LAYOUT.shape)
    across = 0.6 * (x - STARS[1][0]) - 0.8 * (y - STARS[1][1])
    radius = np.hypot(x - STARS[6][0], y - STARS[6][1])
    for k, visit in enumerate(_visits()):
        flux, good = visit.flux, visit.good
        if k == 1:
            flux = flux + 15.0 * np.exp(-0.5 * (across / 2.0) ** 2)
        elif k == 2:
            flux, good = np.where(radius < 5.0, 0.5 * flux, flux), good & (radius > 2.5)
        visits.append(
            dataclasses.replace(
                visit,
                flux=(scale * flux).astype(np.float32),
                variance=scale**2 * visit.variance,
                good=good,
            )
        )
    return visits


def test_trail_and_lost_core_do_not_change_the_psf() -> None:
    refinement = refine_psfs(_spoilt_visits(), LAYOUT)
    assert refinement.anchored
    size, round_to = _errors(refinement)
    assert np.abs(size).max() < 0.004
    assert round_to.max() < 0.003


def test_only_what_is_near_a_trail_or_a_lost_core_loses_its_weight() -> None:
    """Single masked pixels of the sky, and the border of the patch, take nothing from their neighbours."""
    visits = _spoilt_visits()
    data = PatchData(visits, LAYOUT, target_sigma(2.35 * np.array(SEEING)))
    sky = RefinementSky(data, PsfBasis(reference_sigma(data.seeing)), base_steps=30)
    y, x = np.indices(LAYOUT.shape)
    border = np.minimum.reduce([y, x, y[::-1], x[:, ::-1]]) < 3
    kept = []
    for _, visit in data.visits():
        star, other = (visit.kernel.forward(light) for light in (sky.star_light, sky.other_light))
        _, weight = sky.residual(visit, star, other)
        kept.append(weight[data.margin : -data.margin, data.margin : -data.margin].numpy() > 0.0)
    for k in (0, 3):
        good = visits[k].good
        assert kept[k][good & border].mean() > 0.98
        assert kept[k][good].mean() > 0.94
    trail = np.abs(0.6 * (x - STARS[1][0]) - 0.8 * (y - STARS[1][1])) < 1.5
    core = np.hypot(x - STARS[6][0], y - STARS[6][1]) < 4.0
    assert not kept[1][visits[1].good & trail].any()
    assert (visits[2].good & core).any()
    assert not kept[2][core].any()


@pytest.mark.parametrize("stars", [STARS, []])
def test_a_visit_without_pixels_stays_as_it_is(stars: list[tuple[float, float, float]]) -> None:
    visits = _visits(stars)
    visits[2] = dataclasses.replace(visits[2], good=np.zeros_like(visits[2].good))
    refinement = refine_psfs(visits, LAYOUT, base_steps=30)
    assert refinement.anchored == bool(stars)
    np.testing.assert_array_equal(refinement.stamps[2], visits[2].psf)
    assert (refinement.flux_scale[2], refinement.background[2]) == pytest.approx((1.0, 0.0), abs=1e-3)
    assert refinement.flags(2)["uncertain"]
    numbers = summary(refinement, [visit.name for visit in visits])
    assert numbers["visits"]["visit 2"]["fwhm_relative_error"] is None
    assert type(numbers["visits"]["visit 0"]["size_change"]) is float


def test_a_visit_that_shows_no_star_is_called_uncertain() -> None:
    """The PSF of the last is 5 % too wide, and a corner without stars is all that it shows."""
    visits = _visits()
    y, x = np.mgrid[: LAYOUT.shape[0], : LAYOUT.shape[1]]
    visits[3] = dataclasses.replace(
        visits[3], good=visits[3].good & (x < 64) & (y < 15), psf=_stamp(1.05 * SEEING[3])
    )
    refinement = refine_psfs(visits, LAYOUT)
    size, _ = _errors(refinement)
    np.testing.assert_allclose(size[:3], 0.0, atol=3e-3)
    assert [refinement.flags(k)["uncertain"] for k in range(4)] == [False, False, False, True]
    assert size[3] > 0.01


def test_bad_input() -> None:
    visits = _visits()
    with pytest.raises(ValueError, match="base_steps must be at least 1"):
        refine_psfs(visits, LAYOUT, base_steps=0)
    nothing = [dataclasses.replace(visit, psf=np.full_like(visit.psf, np.nan)) for visit in visits]
    with pytest.raises(NothingToRestoreError, match="No visit"):
        refine_psfs(nothing, LAYOUT)
    with pytest.raises(ValueError, match="cells"):
        refine_psfs(visits, CellLayout(2, 2, 48, 64))
    with pytest.raises(ValueError, match="on the pixels of the warps, but visit 0"):
        refine_psfs([finer_observation(visit, 2) for visit in visits], finer_layout(LAYOUT, 2))
    shape = StarFit(1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    unknown = np.full(1, np.nan)
    one = PsfRefinement(
        [visits[0].psf],
        np.ones(1),
        np.zeros((1, 2)),
        np.zeros(1),
        False,
        np.zeros((0, 2)),
        0,
        unknown,
        unknown,
        unknown,
        [shape],
        [shape],
    )
    with pytest.raises(ValueError, match="PSFs of 1 visits"):
        CorrectedObservations(visits, one)
