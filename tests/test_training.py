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
from toy import observe

from lsst.coadd.deepprior.conditions import AXES
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.numerical_settings import MAX_SEED
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, fit_star
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.training import Trainer, TrainingPatch, TrainSettings
from lsst.coadd.deepprior.weights import TrainedNetwork

SETTINGS = TrainSettings(
    steps=12, n_splits=3, refresh_every=4, checkpoint_every=6, base_steps=20, learning_rate=2e-3, seed=3
)
QUICK = RestoreSettings(steps=10, base_steps=40, n_splits=3, n_variance_draws=1)
STARS = [(15.2, 12.7, 2000.0), (25.0, 30.4, 300.0), (8.0, 35.0, 150.0)]


def patches() -> list[TrainingPatch]:
    """Two patches of different shapes, numbers of visits, seeing and targets; one visit has no PSF."""
    first, second = CellLayout(1, 2, 44, 17), CellLayout(2, 1, 21, 36)
    some = observe(first, STARS, [1.5, 1.8, 2.0, 1.6], seed=1, masked_fraction=0.05)
    more = observe(second, STARS, [1.9, 2.1, 2.4, 2.0, 2.2, 1.8], seed=2)
    more[4].psf[...] = np.nan
    return [TrainingPatch("some", some, first), TrainingPatch("more", more, second, target_fwhm=2.4)]


@pytest.fixture(scope="module")
def trained() -> tuple[Trainer, list[dict[str, torch.Tensor]], list[float]]:
    """A training without interruption, its checkpoints and losses."""
    trainer = Trainer(patches(), SETTINGS)
    states: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    trainer.run(progress=lambda step, n_steps, loss: losses.append(loss), checkpoint=states.append)
    return trainer, states, losses


def test_checkpoints_come_in_time(trained) -> None:
    trainer, states, losses = trained
    assert trainer.step == len(losses) == 12
    assert [int(state["step"]) for state in states] == [6, 12]


def test_resumed_training_is_that_without_interruption(trained) -> None:
    """Bit for bit, weights, their average and the state of the optimiser."""
    trainer, states, _ = trained
    resumed = Trainer(patches(), SETTINGS)
    resumed.load_state({name: tensor.clone() for name, tensor in states[0].items()})
    assert resumed.step == 6
    resumed.run()
    expected, found = trainer.state(), resumed.state()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    changed = [name for name in expected if not torch.equal(expected[name], states[0][name])]
    assert len(changed) > 0.9 * len(expected)


def test_states_are_copies(trained) -> None:
    trainer, states, _ = trained
    assert not torch.equal(states[0]["weights.exit.weight"], states[1]["weights.exit.weight"])
    state = trainer.state()
    state["weights.exit.weight"].zero_()
    assert bool(trainer.state()["weights.exit.weight"].any())


def test_state_of_another_network_is_refused(trained) -> None:
    _, states, _ = trained
    trainer = Trainer(patches()[:1], dataclasses.replace(SETTINGS, steps=1))
    missing = {name: tensor for name, tensor in states[0].items() if name != "mean.exit.weight"}
    with pytest.raises(ValueError, match="another network"):
        trainer.load_state(missing)
    with pytest.raises(ValueError, match="another network"):
        trainer.load_state(states[0] | {"weights.exit.weight": torch.zeros(4, 16, 3, 3)})
    assert trainer.step == 0


def test_loss_falls_on_a_toy_set() -> None:
    """The robust loss of visits that were not read, over the last quarter of a training and at its start."""
    losses: list[float] = []
    trainer = Trainer(patches(), dataclasses.replace(SETTINGS, steps=60, checkpoint_every=60))
    trainer.run(progress=lambda step, n_steps, loss: losses.append(loss))
    fitted = [loss.refresh(trainer.network({}).trunk) for loss in trainer._losses]
    start = Trainer(patches(), SETTINGS)
    untrained = [loss.refresh(start.network({}).trunk) for loss in start._losses]
    assert all(after < before for after, before in zip(fitted, untrained, strict=True))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_ranges_are_those_of_the_patches(trained) -> None:
    """The number of visits goes from the fewest that the network read, all but one of four, to the most that
    a patch had: five with a PSF."""
    network = trained[0].network({"name": "toy"})
    assert tuple(network.ranges) == AXES
    assert network.name == "toy"
    low, high = network.ranges["n_visits"]
    assert (low, high) == (3.0, 5.0)
    low, high = network.ranges["seeing_pixels"]
    assert low == pytest.approx(1.7 * FWHM_PER_SIGMA, rel=2e-3)
    assert high == pytest.approx(2.0 * FWHM_PER_SIGMA, rel=2e-3)
    low, high = network.ranges["target_pixels"]
    assert low == pytest.approx(0.5 * 1.7 * FWHM_PER_SIGMA, rel=2e-3)
    assert high == pytest.approx(2.4)
    assert 0.0 < network.ranges["lit_fraction"][0] <= network.ranges["lit_fraction"][1] < 0.5
    assert abs(network.ranges["noise_correlation"][0]) < 0.1
    assert network.ranges["base_steps"] == (20.0, 20.0)


def wide(network: TrainedNetwork) -> TrainedNetwork:
    """The same network, said to be trained on everything."""
    return dataclasses.replace(network, ranges=dict.fromkeys(AXES, (-1e6, 1e6)))


@pytest.mark.parametrize("n_visits", [1, 3])
def test_trained_network_is_used_without_a_step(trained, n_visits: int) -> None:
    network = wide(trained[0].network({}))
    before = network.to_bytes()
    layout = CellLayout(1, 2, 40, 23)
    visits = observe(layout, STARS, [1.6, 1.9, 1.7][:n_visits], seed=5)
    phases = set()
    result = restore(visits, layout, QUICK, network=network, progress=lambda *call: phases.add(call[0]))
    assert result.metrics["method"] == "pretrained network"
    assert result.metrics["network"]["outside"] == []
    assert result.metrics["network"]["conditions"]["n_visits"] == n_visits
    assert phases == {"base", "data steps", "points", "noise"}
    assert result.curves["fit_step"] == []
    assert np.isfinite(result.image).all()
    assert np.isfinite(result.variance).all()
    assert fit_star(result.image, x=15.2, y=12.7, radius=4).flux == pytest.approx(2000.0, rel=0.05)
    base = restore(visits, layout, dataclasses.replace(QUICK, steps=0))
    assert not np.array_equal(result.image, base.image)
    assert network.to_bytes() == before


def test_patch_outside_of_the_trained_ranges_is_fitted_from_scratch(trained) -> None:
    ranges = dict.fromkeys(AXES, (-1e6, 1e6)) | {"n_visits": (5.0, 9.0), "seeing_pixels": (5.0, 6.0)}
    network = dataclasses.replace(trained[0].network({}), ranges=ranges)
    layout = CellLayout(1, 2, 40, 23)
    visits = observe(layout, STARS, [1.6, 1.9, 1.7], seed=5)
    result = restore(visits, layout, QUICK, network=network)
    assert result.metrics["method"] == "network fitted from scratch"
    reasons = result.metrics["network"]["outside"]
    assert [reason.split(" ")[0] for reason in reasons] == ["n_visits", "seeing_pixels"]
    assert "n_visits = 3, trained from 5 to 9" in reasons
    scratch = restore(visits, layout, QUICK)
    np.testing.assert_array_equal(result.image, scratch.image)
    single = restore(visits[:1], layout, QUICK, network=network)
    assert single.metrics["method"] == "network fitted from scratch"
    assert "n_visits = 1, trained from 5 to 9" in single.metrics["network"]["outside"]


def test_patches_that_cannot_be_learned_from_are_refused() -> None:
    with pytest.raises(ValueError, match="without a patch"):
        Trainer([], SETTINGS)
    layout = CellLayout(1, 1, 30, 28)
    visits = observe(layout, [], [1.6, 1.8])
    with pytest.raises(ValueError, match="lonely has 1 visits with a PSF"):
        Trainer([TrainingPatch("lonely", visits[:1], layout)], SETTINGS)
    visits[1].good[...] = False
    with pytest.raises(ValueError, match="lonely has one visit with a good pixel"):
        Trainer([TrainingPatch("lonely", visits, layout)], SETTINGS)


@pytest.mark.parametrize("setting", ["steps", "n_splits", "refresh_every", "checkpoint_every", "base_steps"])
def test_settings_below_one_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, not 0"):
        TrainSettings(**{setting: 0})


def test_other_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings(learning_rate=0.0)
    with pytest.raises(ValueError, match="psf_error"):
        TrainSettings(psf_error=-0.1)
    with pytest.raises(ValueError, match="steps must be at least 1, not 2.5, and a whole number"):
        TrainSettings(steps=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [TrainSettings, RestoreSettings])
def test_settings_that_are_no_numbers_are_refused(settings: type[TrainSettings | RestoreSettings]) -> None:
    for name in ("learning_rate", "huber_delta", "psf_error"):
        with pytest.raises(ValueError, match="must be positive"):
            settings(**{name: math.nan})
    for seed in (-1, 0.5, 1e30):
        with pytest.raises(ValueError, match="seed must be at least 0, not .* and a whole number"):
            settings(seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at most 4294967295, not 10{30}"):
        settings(seed=10**30)


def test_the_largest_seed_can_be_used() -> None:
    layout = CellLayout(1, 1, 30, 28)
    patch = TrainingPatch("one", observe(layout, [(8.0, 12.0, 300.0)], [1.6, 1.8]), layout)
    Trainer([patch], dataclasses.replace(SETTINGS, seed=MAX_SEED)).run()
