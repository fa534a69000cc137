# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Noise from one pass over the visits, against visits that are really drawn and read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.noise import NoisyModel
from lsst.coadd.deepprior.noise_draws import draw_noise
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import inner_sigma
from lsst.coadd.deepprior.statistics import VisitSets

LAYOUT = CellLayout(2, 2, 40, 36)
SIGMA = 0.9
MARGIN = 8
WHITE = np.ones((5, 1, 1))


@pytest.fixture(scope="module")
def data() -> PatchData:
    visits = observe(LAYOUT, [], [1.5, 1.8, 2.1, 1.6, 1.7], seed=4, masked_fraction=0.05, noise=2.0)
    visits[1].variance[:30] *= 4.0
    return PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)


@pytest.fixture(scope="module")
def truth(data: PatchData) -> torch.Tensor:
    latent = torch.full(data.shape, 0.05)
    stars = gaussian_stars(LAYOUT.shape, [(20.3, 30.6, 3000.0), (55.0, 60.2, 300.0)], 0.7)
    assert inner_sigma(SIGMA) < 0.7
    latent[MARGIN:-MARGIN, MARGIN:-MARGIN] += torch.as_tensor(stars, dtype=torch.float32)
    return latent


def really(data: PatchData, truth: torch.Tensor, seed: int) -> PatchData:
    return data.with_observations(NoisyModel(data.observations, data, truth, seed, WHITE))


def test_the_noise_is_that_of_the_visits(data: PatchData, truth: torch.Tensor) -> None:
    """The same seed gives the same median, and the gradient at the model that clipping at it gives, over the
    part of the noise that is not clipped."""
    sets = data.sets()
    drawn, read = draw_noise(data, sets, truth, 7, WHITE), really(data, truth, 7)
    torch.testing.assert_close(drawn.lower_median(sets), read.lower_median(sets), rtol=1e-4, atol=1e-3)
    mine, theirs = (one.linearise(sets, truth[None]) for one in (drawn, read))
    predicted = sets.gram.forward(truth[None])
    gradient, expected = (one.seen - one.coverage * predicted for one in (mine, theirs))
    sky = inner_smooth(truth, SIGMA)[None] < 0.5
    # P(|n| < 1.5 sigma) = 0.8664
    ratio = float((gradient * expected)[sky].sum() / expected[sky].square().sum())
    assert ratio == pytest.approx(1.0 / 0.8664, rel=0.01)
    assert float(torch.corrcoef(torch.stack([gradient[sky], expected[sky]]))[0, 1]) > 0.999


def test_a_restoration_answers_as_to_visits_that_are_read(data: PatchData, truth: torch.Tensor) -> None:
    sets = data.sets()
    inner = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    clean = inner_smooth(truth, SIGMA)[inner]
    changes = []
    for noisy, steps in ((draw_noise(data, sets, truth, 3, WHITE), 72), (really(data, truth, 3), 240)):
        latent = maximum_likelihood(noisy, sets, steps=steps).latent[0]
        changes.append((inner_smooth(latent, SIGMA)[inner] - clean).flatten())
    assert float(torch.corrcoef(torch.stack(changes))[0, 1]) > 0.85
    assert float(changes[0].std() / changes[1].std()) == pytest.approx(1.0, abs=0.15)


def test_noise_is_no_larger_where_the_model_is_dark() -> None:
    """In a sky without light but the far wings of a star whose core all visits lack, realisations have the
    noise of visits that are read."""
    visits = observe(LAYOUT, [], [1.5, 1.8, 2.1, 1.6, 1.7], seed=4, masked_fraction=0.02, noise=2.0)
    for visit in visits:
        visit.good[40:60, 40:46] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    sets = data.sets()
    dark = torch.zeros(data.shape)
    star = gaussian_stars(LAYOUT.shape, [(42.6, 50.3, 1e5)], 0.7)
    dark[MARGIN:-MARGIN, MARGIN:-MARGIN] += torch.as_tensor(star, dtype=torch.float32)
    inner = np.s_[MARGIN:-MARGIN, MARGIN:-MARGIN]
    clean = inner_smooth(dark, SIGMA)[inner]
    y, x = np.indices(LAYOUT.shape)
    sky = np.hypot(y - 50.3, x - 42.6) > 14.0
    deviations = []
    for steps, noisy in ((72, draw_noise(data, sets, dark, 3, WHITE)), (240, really(data, dark, 3))):
        latent = maximum_likelihood(noisy, sets, steps=steps).latent[0]
        change = inner_smooth(latent, SIGMA)[inner] - clean
        deviations.append(float(change[torch.as_tensor(sky)].square().mean().sqrt()))
    assert deviations[0] / deviations[1] == pytest.approx(1.0, abs=0.15)


def test_the_visits_are_read_once(
    data: PatchData, truth: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = PatchData._tensors
    monkeypatch.setattr(
        PatchData,
        "_tensors",
        lambda self, index, observation: read.append(index) or original(self, index, observation),
    )
    sets = VisitSets(*(getattr(data.sets(), name) for name in VisitSets.__dataclass_fields__))
    read.clear()
    noisy = draw_noise(data, sets, truth, 5, WHITE)
    assert sorted(read) == [0, 1, 2, 3, 4]
    maximum_likelihood(noisy, sets, steps=30)
    assert len(read) == 5


def test_one_set_only(data: PatchData, truth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one set of all visits, not for 2"):
        draw_noise(data, data.sets(torch.ones(2, data.n_groups, dtype=torch.bool)), truth, 1, WHITE)
