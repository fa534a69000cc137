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

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.fit import (
    N_TURNS,
    SplitLoss,
    WeightAverage,
    _turned,
    _turned_back,
    corrected,
    latent_image,
    make_trunk,
    mean_latent_image,
    one_cycle,
)
from lsst.coadd.deepprior.groups import deal_splits
from lsst.coadd.deepprior.network import FEATURES, Features, Trunk, encoder_features, latent_and_slope
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData

LAYOUT = CellLayout(2, 1, 24, 41)
STARS = [(20.2, 15.7, 900.0), (30.0, 30.4, 300.0)]
SIGMA = 0.9
MARGIN = 8
CPU = torch.device("cpu")


def visits_of(seed: int = 1) -> list[Observation]:
    return observe(LAYOUT, STARS, [1.6, 1.8, 2.0, 1.7], seed=seed, masked_fraction=0.1)


def random_trunk(data: PatchData, seed: int) -> Trunk:
    """A network whose last layer is not zero."""
    net = make_trunk(seed, CPU, data.dtype)
    with torch.no_grad():
        net.exit.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    return net


def parameters_after_steps(loss: SplitLoss, data: PatchData, n_steps: int) -> Trunk:
    """Fit as a restoration does: with a learning rate that decays, and averaged weights."""
    net = make_trunk(1, CPU, data.dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    average = WeightAverage(net, 0.9)
    generator = torch.Generator().manual_seed(1)
    for step in range(n_steps):
        if step % 10 == 0:
            loss.refresh(net)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(net, step % len(loss), int(torch.randint(N_TURNS, (1,), generator=generator)))
        optimizer.param_groups[0]["lr"] = 2e-3 * one_cycle(step, n_steps)
        optimizer.step()
        average.update(net, step)
    average.copy_to(net)
    return net


@pytest.mark.parametrize("turn", range(N_TURNS))
def test_turns_are_undone(turn: int) -> None:
    image = torch.arange(12.0).reshape(1, 3, 4)
    torch.testing.assert_close(_turned_back(_turned(image, turn)[0], turn), image[0], rtol=0, atol=0)


def test_turns_are_all_different() -> None:
    image = torch.arange(12.0).reshape(1, 3, 4)
    assert len({tuple(_turned(image, turn).flatten().tolist()) for turn in range(N_TURNS)}) == N_TURNS


@pytest.mark.parametrize("turn", [0, 5])
def test_gradient_is_that_of_the_visits_of_the_loss(turn: int) -> None:
    """At the linearisation the gradient in z is that of the robust objective of the visits, visit by visit,
    divided by the preconditioner."""
    data = PatchData(visits_of(), LAYOUT, SIGMA, margin=MARGIN, dtype=torch.float64)
    encoder, held_out = deal_splits(4, 4, torch.Generator().manual_seed(1))
    loss = SplitLoss(data, encoder, held_out, base_steps=5)
    net = make_trunk(1, CPU, data.dtype)
    split = 2
    loss.refresh(net)
    loss.backward(net, split, turn)
    bias = net.exit.bias.grad
    features = encoder_features(maximum_likelihood(data, data.sets(encoder), steps=5))[split]
    with torch.no_grad():
        latent, slope = latent_and_slope(corrected(net, features), features.noise)
    gradient = torch.zeros_like(latent)
    scale = torch.zeros_like(latent)
    for index, visit in data.visits():
        if held_out[split, data.group[index]]:
            prediction = visit.kernel.forward(latent)
            limit = data.huber_delta * data.scale(visit, prediction)
            clipped = torch.minimum(torch.maximum(visit.flux - prediction, -limit), limit)
            gradient -= visit.kernel.adjoint(visit.weight * clipped)
            # Constant PSFs and weights: A 1 is that of all pixels.
            everywhere = torch.full_like(latent, data.weight[index].max())
            scale += visit.kernel.adjoint(visit.kernel.forward(torch.ones_like(latent)) * everywhere)
    gradient = gradient * slope * features.covered / torch.sqrt(1.0 + slope.square() * scale)
    inner = (slice(10, -10), slice(10, -10))
    z = torch.zeros_like(latent, requires_grad=True)
    # The network turns with the features: what its output bias sees is the turned gradient of the parts.
    moved = _turned(gradient[None] * features.gate, turn)[0]
    expected = torch.stack([moved[y::2, x::2].sum() for y in (0, 1) for x in (0, 1)]) / z.numel()
    assert gradient[inner].abs().max() > 0.0
    torch.testing.assert_close(bias, expected, rtol=2e-2, atol=2e-4)


def test_network_is_told_nothing_where_no_visit_sees() -> None:
    visits = visits_of()
    for visit in visits:
        visit.good[:, visit.good.shape[1] // 2 :] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    features = encoder_features(maximum_likelihood(data, data.sets(), steps=30))
    unseen = ~features.covered[0]
    assert 0 < int(unseen.sum()) < unseen.numel()
    assert not bool(features.channels[0, :, unseen].any())
    assert bool(features.channels[0, :, ~unseen].all(dim=1).any())


def test_objective_falls_in_a_fit() -> None:
    data = PatchData(visits_of(), LAYOUT, SIGMA, margin=MARGIN)
    loss = SplitLoss(data, *deal_splits(4, 4, torch.Generator().manual_seed(1)), base_steps=30)
    first = loss.refresh(make_trunk(1, CPU, data.dtype))
    assert loss.refresh(parameters_after_steps(loss, data, 60)) < first


def test_restoration_does_not_change_with_visits_that_were_not_read() -> None:
    """Bit for bit, whatever the network, in masked pixels as well."""
    visits = visits_of()
    sides = torch.tensor([[True, False, True, False]])
    images = []
    for change in (0.0, 500.0):
        other = [
            dataclasses.replace(visit, flux=visit.flux + np.float32(change)) if index % 2 else visit
            for index, visit in enumerate(visits)
        ]
        data = PatchData(other, LAYOUT, SIGMA, margin=MARGIN)
        features = encoder_features(maximum_likelihood(data, data.sets(sides), steps=30))
        images.append(latent_image(random_trunk(data, 3), features[0]))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)


def test_restoration_after_a_fit_shares_no_noise_with_the_other_side() -> None:
    """Visits of pure noise, 30 % masked: what a fitted network makes of A does not covary with the noise of
    B, but clearly with that of A."""
    layout = CellLayout(1, 1, 48, 44)
    encoder = torch.tensor([[True, True, False, False], [False, False, True, True]])
    own, other = [], []
    for seed in range(12):
        visits = observe(layout, [], [1.6, 1.9, 1.7, 2.0], seed=50 + seed, masked_fraction=0.3)
        data = PatchData(visits, layout, SIGMA, margin=MARGIN)
        loss = SplitLoss(data, encoder, ~encoder, base_steps=20)
        net = parameters_after_steps(loss, data, 12)
        features = encoder_features(maximum_likelihood(data, data.sets(encoder), steps=20))
        noise = np.array([np.where(visit.good, visit.flux, 0.0) for visit in visits])
        covariance = np.empty((2, 2))
        for split in range(2):
            image = inner_smooth(latent_image(net, features[split]), SIGMA)[8:-8, 8:-8].numpy()
            image = (image - image.mean()) / image.std()
            for side in range(2):
                covariance[split, side] = np.mean(image * noise[encoder.numpy()[side]].mean(axis=0))
        own.append(np.trace(covariance) / 2)
        other.append((covariance[0, 1] + covariance[1, 0]) / 2)
    error = np.std(other, ddof=1) / np.sqrt(len(other))
    assert abs(np.mean(other)) < 3.0 * error
    assert abs(np.mean(other)) < 0.1 * np.mean(own)
    assert np.mean(own) > 10.0 * error


def test_two_sides_that_share_a_group_are_refused() -> None:
    data = PatchData(visits_of(), LAYOUT, SIGMA, margin=MARGIN)
    sides = torch.tensor([[True, True, False, False]])
    with pytest.raises(ValueError, match="must not share"):
        SplitLoss(data, sides, ~torch.tensor([[False, True, False, False]]), base_steps=2)
    with pytest.raises(RuntimeError, match="refresh"):
        SplitLoss(data, sides, ~sides, base_steps=2).backward(make_trunk(1, CPU, data.dtype), 0, 0)


def test_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = make_trunk(3, CPU, torch.float64)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    second, third = make_trunk(3, CPU, torch.float64), make_trunk(4, CPU, torch.float64)
    assert torch.equal(first.entry.weight, second.entry.weight)
    assert not torch.equal(first.entry.weight, third.entry.weight)
    assert first.entry.weight.dtype == torch.float64


def test_average_of_the_weights() -> None:
    """Like the mean at first, and with a memory of 1 / (1 - decay) steps later."""
    net = make_trunk(1, CPU, torch.float64)
    average = WeightAverage(net, 0.9)
    expected = 0.0
    for step in range(60):
        with torch.no_grad():
            net.exit.bias.fill_(float(step))
        average.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    other = make_trunk(2, CPU, torch.float64)
    average.copy_to(other)
    torch.testing.assert_close(other.exit.bias.detach(), torch.full((4,), expected, dtype=torch.float64))
    assert 45.0 < expected < 55.0
    torch.testing.assert_close(other.entry.weight, net.entry.weight)


def test_learning_rate_rises_and_falls() -> None:
    rates = [one_cycle(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert np.argmax(rates) == 4
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert one_cycle(0, 1) == 1.0


def test_mean_over_shifts_has_no_pattern_of_the_half_resolution() -> None:
    """A network whose four pixels of one differ paints a pattern; in the mean they are the same."""
    net = Trunk()
    with torch.no_grad():
        net.exit.bias.copy_(torch.tensor([0.4, -0.2, 0.1, 0.3]))
    shape = (19, 24)
    features = Features(
        channels=torch.zeros(len(FEATURES), *shape),
        start=torch.zeros(shape),
        gate=torch.ones(shape),
        noise=torch.ones(shape),
        covered=torch.ones(shape, dtype=torch.bool),
    )
    assert float(latent_image(net, features).std()) > 0.05
    expected, _ = latent_and_slope(torch.tensor(0.15), torch.tensor(1.0))
    torch.testing.assert_close(mean_latent_image(net, features), expected.expand(shape))
