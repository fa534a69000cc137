# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Tests of the two halves that one visit is split into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import observe

from lsst.coadd.deepprior.baselines import maximum_likelihood
from lsst.coadd.deepprior.halves import NoiseHalves, in_halves
from lsst.coadd.deepprior.noise_correlation import correlated_noise
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.smoothing import gaussian_smooth

LAGS = np.zeros((3, 3))
LAGS[1] = 0.4, 1.0, 0.4
"""Noise that is correlated along x."""


def visit(rng: np.random.Generator) -> Observation:
    """Return a visit of correlated noise alone that gets deeper along y, with a hole."""
    shape = (300, 410)
    variance = np.linspace(1.0, 9.0, shape[0], dtype=np.float32)[:, None] * np.ones(shape, dtype=np.float32)
    good = np.ones(shape, dtype=bool)
    good[20:40, 33:90] = False
    flux = correlated_noise(shape, LAGS, rng) * np.sqrt(variance)
    flux[~good], variance[~good] = np.nan, np.nan
    return Observation(flux, variance, good, gaussian_stamp(1.5)[None, None], (3, 5), "visit 7")


def test_halves_share_no_noise_and_their_mean_is_the_visit() -> None:
    whole = visit(np.random.default_rng(1))
    first, second = NoiseHalves([whole], LAGS[None], seed=2)
    good = whole.good
    np.testing.assert_allclose(0.5 * (first.flux + second.flux)[good], whole.flux[good], atol=1e-5)
    assert first.origin == whole.origin
    assert first.name != second.name
    sigma = np.sqrt(first.variance)
    np.testing.assert_allclose(sigma[good] ** 2, 2.0 * whole.variance[good], rtol=1e-6)
    one, other = (np.where(good, half.flux / sigma, 0.0) for half in (first, second))
    n = good.sum()
    for half in (one, other):
        assert np.sum(half * half) / n == pytest.approx(1.0, abs=0.02)
        assert np.sum(half[:, 1:] * half[:, :-1]) / n == pytest.approx(0.4, abs=0.02)
    # Noise of the halves at lags along x, y and none: 4 standard errors of independent noise are 0.013.
    for product in (one * other, one[:, 1:] * other[:, :-1], one[1:] * other[:-1]):
        assert abs(np.sum(product) / n) < 0.013


def test_halves_of_white_noise_would_share_that_of_a_visit_with_correlated() -> None:
    """The correlation is needed: without it neighbours share what they should not."""
    whole = visit(np.random.default_rng(1))
    white = np.zeros((1, 3, 3))
    white[0, 1, 1] = 1.0
    one, other = (np.where(whole.good, half.flux, 0.0) for half in NoiseHalves([whole], white, seed=2))
    shared = np.sum(one[:, 1:] * other[:, :-1]) / np.sum(one * one)
    assert shared == pytest.approx(0.2, abs=0.02)


def test_halves_are_the_same_whenever_they_are_read() -> None:
    visits = [visit(np.random.default_rng(seed)) for seed in (1, 2)]
    halves = NoiseHalves(visits, np.stack([LAGS, LAGS]), seed=3)
    assert len(halves) == 4
    assert len(list(halves)) == 4
    np.testing.assert_array_equal(halves[2].flux, halves[2].flux)
    added = [(halves[2 * t].flux - visits[t].flux)[visits[t].good] for t in range(2)]
    assert abs(np.corrcoef(*added)[0, 1]) < 0.02
    other = NoiseHalves(visits, np.stack([LAGS, LAGS]), seed=4)
    assert abs(np.corrcoef(added[0], (other[0].flux - visits[0].flux)[visits[0].good])[0, 1]) < 0.02
    with pytest.raises(IndexError, match="There are 4 halves of visits, none is number -1"):
        halves[-1]
    assert "visit 7" in halves[0].name


def test_a_correlation_for_every_visit_is_asked_for() -> None:
    whole = visit(np.random.default_rng(1))
    with pytest.raises(ValueError, match="1 visits need as many correlations"):
        NoiseHalves([whole], np.stack([LAGS, LAGS]), seed=3)


def test_patch_in_halves_measures_the_correlation_of_the_noise() -> None:
    whole = visit(np.random.default_rng(1))
    data = PatchData([whole], CellLayout(1, 1, 311, 419), 1.0, margin=7)
    halves = in_halves(data, torch.zeros(data.shape), seed=2)
    assert halves.n_groups == 2
    assert (halves.sigma, halves.shape) == (data.sigma, data.shape)
    one, other = (
        torch.where(half.weight > 0, half.flux / half.variance.sqrt(), 0.0)[7 + 3 : 7 + 303, 7 + 5 : 7 + 415]
        for half in (halves.visit(0), halves.visit(1))
    )
    n = whole.good.sum()
    assert float((one * one).sum()) / n == pytest.approx(1.0, abs=0.02)
    for product in (one * other, one[:, 1:] * other[:, :-1], one[1:] * other[:-1]):
        assert abs(float(product.sum()) / n) < 0.013


def test_halves_share_no_noise_on_the_scale_of_the_psf_that_the_model_holds() -> None:
    """What maximum likelihood leaves of a single visit has lost noise of that scale to the model."""
    sigma = 1.5
    layout = CellLayout(1, 1, 240, 250)
    stars = [(x, y, 500.0) for x in range(20, 250, 40) for y in range(25, 240, 50)]
    data = PatchData(observe(layout, stars, [sigma], seed=5), layout, 0.9)
    latent = maximum_likelihood(data, data.sets(), steps=40).latent[0]
    halves = in_halves(data, latent, seed=2)
    (sky,) = observe(layout, stars, [sigma], noiseless=True)
    margin = data.margin
    noise = torch.stack([halves.visit(k).flux[margin:-margin, margin:-margin] for k in (0, 1)])
    one, other = gaussian_smooth(noise - torch.as_tensor(sky.flux), sigma)
    shared = float((one * other).sum() / (one.norm() * other.norm()))
    # 4 standard errors of independent noise that is smoothed so far.
    assert abs(shared) < 0.062
