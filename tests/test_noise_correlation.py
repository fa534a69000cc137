# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toy import observe

from lsst.coadd.deepprior.finer import OVERSAMPLINGS, finer_layout, finer_observation
from lsst.coadd.deepprior.joint_fit import JointFit
from lsst.coadd.deepprior.noise import NoisyModel
from lsst.coadd.deepprior.noise_correlation import (
    REACH,
    correlated_noise,
    noise_correlation,
    visit_correlations,
)
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.resampling import Resampling

SIGMA = 0.9


def triangle() -> np.ndarray:
    """Return the correlation of the mean of two neighbours along x: 1/2 at a lag of one pixel."""
    result = np.zeros((2 * REACH + 1, 2 * REACH + 1))
    result[REACH, REACH - 1 : REACH + 2] = 0.5, 1.0, 0.5
    return result


def test_correlation_is_measured_in_holes_and_all() -> None:
    white = np.random.default_rng(1).standard_normal((180, 231))
    noise = (white[:, 1:] + white[:, :-1]) / np.sqrt(2.0)
    where = np.random.default_rng(2).random(noise.shape) > 0.3
    found = noise_correlation(np.where(where, noise, np.nan), where)
    np.testing.assert_allclose(found, triangle(), atol=0.03)
    # A different axis is not the same thing.
    np.testing.assert_allclose(noise_correlation(noise.T, where.T), triangle().T, atol=0.03)


def test_white_noise_has_no_correlation() -> None:
    white = np.random.default_rng(3).standard_normal((300, 310))
    found = noise_correlation(white, np.ones(white.shape, dtype=bool))
    found[REACH, REACH] -= 1.0
    assert np.abs(found).sum() < 0.1
    nothing = noise_correlation(white, np.zeros(white.shape, dtype=bool))
    assert nothing.sum() == nothing[REACH, REACH] == 1.0


def test_drawn_noise_has_the_correlation() -> None:
    rng = np.random.default_rng(4)
    noise = correlated_noise((251, 300), triangle(), rng)
    assert noise.shape == (251, 300)
    assert noise.std() == pytest.approx(1.0, rel=0.02)
    everywhere = np.ones(noise.shape, dtype=bool)
    np.testing.assert_allclose(noise_correlation(noise, everywhere), triangle(), atol=0.03)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        noise_correlation(np.zeros((4, 5)), np.ones((5, 4), dtype=bool))
    with pytest.raises(ValueError, match="not finite"):
        noise_correlation(np.full((9, 9), np.nan), np.ones((9, 9), dtype=bool))
    with pytest.raises(ValueError, match="1 in the middle"):
        correlated_noise((9, 9), np.zeros((3, 3)), np.random.default_rng(0))


def test_noise_of_a_visit_is_that_of_its_sky_or_of_its_noise_image() -> None:
    """One visit is resampled, one white but for a trail, one shows in a noise image how it was resampled."""
    layout = CellLayout(2, 2, 70, 80)
    visits = observe(layout, [(60.0, 40.0, 3000.0)], [1.5, 2.0, 1.8], seed=5)
    rng = np.random.default_rng(6)
    resampling = Resampling(layout.shape, "bilinear", 0.3, (0.4, 0.2))

    def resampled() -> np.ndarray:
        noise = resampling.image(rng.standard_normal(resampling.detector_shape))
        return noise / np.sqrt(resampling.variance(np.ones(resampling.detector_shape)))

    data = PatchData(visits, layout, SIGMA, margin=8)
    latent = torch.zeros(data.shape)
    visits[0] = dataclasses.replace(visits[0], flux=resampled().astype(np.float32))
    trail = 3.0 * np.exp(-0.5 * ((np.arange(140)[:, None] - 100.0) / 2.0) ** 2)
    sky = rng.standard_normal(layout.shape)
    visits[1] = dataclasses.replace(visits[1], flux=(sky + trail).astype(np.float32))
    visits[2] = dataclasses.replace(
        visits[2], flux=sky.astype(np.float32), noise=(2.0 * resampled()).astype(np.float32)
    )
    found = visit_correlations(PatchData(visits, layout, SIGMA, margin=8), latent)
    expected = noise_correlation(resampled(), np.ones(layout.shape, dtype=bool))
    assert expected[REACH, REACH + 1] > 0.2
    near = np.s_[REACH - 1 : REACH + 2, REACH - 1 : REACH + 2]
    np.testing.assert_allclose(found[0][near], expected[near], atol=0.06)
    np.testing.assert_allclose(found[2][near], expected[near], atol=0.06)
    assert np.abs(found[1].sum() - 1.0) < 0.2
    drawn = NoisyModel(visits, data, latent, seed=1, correlations=found)[0].flux
    np.testing.assert_allclose(
        noise_correlation(drawn, np.ones(drawn.shape, dtype=bool))[near], found[0][near], atol=0.06
    )


def excess(correlation: np.ndarray, psf: np.ndarray) -> float:
    """Return the variance of PSF fluxes over that of white noise."""
    coadd = Coadd(
        np.zeros((60, 60)), 2.0, np.zeros((60, 60)), np.ones((60, 60)), gaussian_stamp(3.0)[None, None]
    )
    return coadd.correlated(correlation).noise_excess(psf)


@pytest.mark.parametrize("noise_image", [False, True])
@pytest.mark.parametrize("step", OVERSAMPLINGS)
def test_noise_on_finer_pixels_is_that_of_the_visits(step: int, noise_image: bool) -> None:
    """Also that of the lags beyond the first, which a Lanczos kernel makes, and near a trail."""
    layout = CellLayout(1, 1, 150, 170)
    (visit,) = observe(layout, [], [1.5])
    resampling = Resampling(layout.shape, "lanczos3", shift=(0.5, 0.5))
    rng = np.random.default_rng(8)
    noise = resampling.image(rng.standard_normal(resampling.detector_shape))
    noise /= np.sqrt(resampling.variance(np.ones(resampling.detector_shape)))
    noise = noise.astype(np.float32)
    trail = 4.0 * np.exp(-0.5 * ((np.arange(150)[:, None] - 100.0) / 4.0) ** 2)
    flux = (noise + trail).astype(np.float32)
    visit = dataclasses.replace(visit, flux=flux, noise=noise if noise_image else None)
    found, drawn = [], []
    for visits, grid in (([visit], layout), ([finer_observation(visit, step)], finer_layout(layout, step))):
        data = PatchData(visits, grid, 2.0)
        latent = torch.zeros(data.shape)
        correlations = visit_correlations(data, latent)
        found.append(correlations[0])
        drawn.append(NoisyModel(visits, data, latent, seed=1, correlations=correlations)[0].flux)
    first = (step - 1) // 2
    np.testing.assert_allclose(found[1][::step, ::step], found[0], atol=1e-4)
    psf = gaussian_stamp(1.5, 13)
    spaced = np.zeros((13 * step, 13 * step))
    spaced[first::step, first::step] = psf
    assert excess(found[0], psf) > 1.5
    assert excess(found[1], spaced) == pytest.approx(excess(found[0], psf), rel=0.02)
    everywhere = np.ones(layout.shape, dtype=bool)
    own = noise_correlation(drawn[1][first::step, first::step], everywhere)
    assert excess(own, psf) == pytest.approx(excess(found[0], psf), rel=0.1)


def test_errors_of_a_fit_hold_the_correlation() -> None:
    """The scatter of PSF fluxes on correlated noise is their error, which for white noise is too small."""
    shape, psf = (220, 260), gaussian_stamp(2.0, 21)
    noise = 3.0 * correlated_noise(shape, triangle(), np.random.default_rng(7)).astype(float)
    arguments = (np.zeros(shape), SIGMA, noise, np.full(shape, 9.0), psf[None, None])
    white, coadd = Coadd(*arguments), Coadd(*arguments, noise_correlation=triangle())
    points = [coadd.point(y, x) for y in range(15, 210, 18) for x in range(15, 250, 18)]
    fit, white_fit = JointFit.of(points, coadd), JointFit.of(points, white)
    np.testing.assert_allclose(fit.solution(), white_fit.solution())
    assert np.std(fit.solution()) == pytest.approx(np.median(fit.errors()), rel=0.12)
    assert np.median(fit.errors()) > 1.3 * np.median(white_fit.errors())
    middle = coadd.information[110, 130] ** -0.5
    assert np.median(fit.errors()) == pytest.approx(middle, rel=0.02)
    assert white.noise_excess(psf) == 1.0
    np.testing.assert_array_equal(white.correlated(triangle()).information, coadd.information)
