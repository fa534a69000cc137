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

from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.statistics import NothingToRestoreError, PatchData, deal_splits

LAYOUT = CellLayout(2, 3, 22, 17)
SIGMA = 0.9


@pytest.fixture
def data() -> PatchData:
    """Five visits with masks, an outlier, PSFs that vary from cell to cell, and a partial visit."""
    stars = [(20.2, 15.7, 900.0), (36.0, 30.4, 300.0)]
    visits = observe(LAYOUT, stars, [1.5, 1.8, 2.1, 1.6, 1.9], masked_fraction=0.1, seed=2)
    visits[1].flux[5:8, 7:30] += 80.0
    varied = visits[2].psf.copy()
    varied[1, 2] = observe(LAYOUT, [], [2.4])[0].psf[0, 0]
    visits[2] = dataclasses.replace(visits[2], psf=varied)
    part = visits[3]
    visits[3] = dataclasses.replace(
        part,
        flux=part.flux[7:40, 11:45],
        variance=part.variance[7:40, 11:45],
        good=part.good[7:40, 11:45],
        origin=(7, 11),
    )
    return PatchData(visits, LAYOUT, SIGMA, margin=5, dtype=torch.float64)


def direct_objective(
    data: PatchData, member: torch.Tensor, model: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """Robust objective visit by visit, from its definition, with the scale s of a reference model."""
    total = torch.zeros((), dtype=model.dtype)
    delta = data.huber_delta
    for index, visit in data.visits():
        if member[index]:
            scale = data.scale(visit, visit.kernel.forward(reference))
            r = (visit.flux - visit.kernel.forward(model)) / scale
            rho = torch.where(r.abs() <= delta, 0.5 * r * r, delta * (r.abs() - 0.5 * delta))
            total = total + (visit.weight * scale.square() * rho).sum()
    return total


def some_model(data: PatchData, seed: int) -> torch.Tensor:
    return 3.0 * torch.rand(data.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEMBERS = torch.tensor([[True, True, True, True, True], [True, False, True, True, False]])


def test_gradient_at_the_linearisation_is_that_of_the_visits(data: PatchData) -> None:
    models = torch.stack([some_model(data, 1), some_model(data, 2)])
    statistics = data.linearise(MEMBERS, models)
    gradient = statistics.gram.forward(models) - statistics.matched
    for member, model, surrogate in zip(MEMBERS, models, gradient, strict=True):
        u = model.clone().requires_grad_()
        (expected,) = torch.autograd.grad(direct_objective(data, member, u, model), u)
        torch.testing.assert_close(surrogate, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_surrogate_lies_above_the_objective() -> None:
    """With one PSF a visit the quadratic through the linearisation bounds the robust objective from above."""
    visits = observe(LAYOUT, [(20.2, 15.7, 900.0)], [1.5, 1.8, 2.1], masked_fraction=0.2, seed=3)
    visits[1].flux[5:8, 7:30] += 80.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=5, dtype=torch.float64)
    member = torch.ones(1, 3, dtype=torch.bool)
    model = some_model(data, 1)
    statistics = data.linearise(member, model[None])
    at_model = direct_objective(data, member[0], model, model)

    def quadratic(u: torch.Tensor) -> torch.Tensor:
        return (0.5 * u * statistics.gram.forward(u)[0] - u * statistics.matched[0]).sum()

    for seed in range(2, 8):
        other = some_model(data, seed) * 2.0
        bound = at_model + quadratic(other) - quadratic(model)
        exact = direct_objective(data, member[0], other, model)
        assert float(bound) >= float(exact)


def test_without_masks_and_clipping_the_quadratic_is_exact_inside() -> None:
    """One PSF, one weight, no edges: M does not depend on the model that it was made at."""
    visits = observe(LAYOUT, [(20.2, 15.7, 900.0)], [1.5, 1.8], seed=4)
    data = PatchData(visits, LAYOUT, SIGMA, margin=5, huber_delta=1e9, dtype=torch.float64)
    member = torch.ones(1, 2, dtype=torch.bool)
    field = torch.zeros(data.shape, dtype=torch.float64)
    field[20:30, 20:35] = some_model(data, 1)[20:30, 20:35]
    first = data.linearise(member, torch.zeros_like(field)[None])
    second = data.linearise(member, field[None])
    torch.testing.assert_close(first.matched, second.matched, rtol=1e-8, atol=1e-6)


def test_sets_know_their_own_visits_only(data: PatchData) -> None:
    """Changing the data of a visit changes nothing in the statistics of a set without it."""
    models = torch.stack([some_model(data, 1), some_model(data, 2)])
    before = data.linearise(MEMBERS, models)
    observations = list(data._observations)
    spoiled = observations[1].flux + 1e3
    after = data.with_observations(
        [observations[0], dataclasses.replace(observations[1], flux=spoiled), *observations[2:]]
    ).linearise(MEMBERS, models)
    for name in ("matched", "coadd", "objective", "sensitivity"):
        first, second = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert not torch.equal(before.matched[0], after.matched[0])


def test_weights_and_fractions_of_a_partial_visit(data: PatchData) -> None:
    assert data.weight.shape == (5, 2, 3)
    np.testing.assert_allclose(data.weight[data.weight > 0], 1.0)
    # Visit 3 spans rows 7-39 and columns 11-44 of cells of 22 x 17 pixels.
    np.testing.assert_allclose(data.overlap[3, 0], [15 * 6 / 374, 15 * 17 / 374, 15 * 11 / 374])
    np.testing.assert_allclose(data.overlap[3, 1], [18 * 6 / 374, 18 * 17 / 374, 18 * 11 / 374])
    assert np.all(data.good_fraction <= data.overlap)


def test_lower_median_ignores_a_minority(data: PatchData) -> None:
    trail = data.lower_median(MEMBERS)[0, 5 + 5 : 5 + 8, 5 + 7 : 5 + 12]
    assert float(trail.max()) < 20.0


def test_visits_that_do_not_fit_are_refused() -> None:
    visits = observe(LAYOUT, [], [1.5])
    with pytest.raises(ValueError, match="has PSFs for"):
        PatchData(visits, CellLayout(1, 1, *LAYOUT.shape), SIGMA)
    with pytest.raises(ValueError, match="outside the patch"):
        PatchData([dataclasses.replace(visits[0], origin=(1, 0))], LAYOUT, SIGMA)
    nothing = dataclasses.replace(visits[0], good=np.zeros(LAYOUT.shape, dtype=bool))
    with pytest.raises(NothingToRestoreError, match="No visit"):
        PatchData([nothing], LAYOUT, SIGMA)


@pytest.mark.parametrize("n_visits", [2, 3, 4, 5, 12, 31])
def test_splits(n_visits: int) -> None:
    encoder, loss = deal_splits(n_visits, 24, torch.Generator().manual_seed(1))
    assert not bool((encoder & loss).any())
    assert bool((encoder | loss).all())
    times = loss.sum(dim=0)
    assert int(times.max() - times.min()) <= 1
    if n_visits < 5:
        assert len(loss) == n_visits
        assert bool((loss.sum(dim=1) == 1).all())


def test_one_visit_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="two visits"):
        deal_splits(1, 8, torch.Generator())
