# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How a training is interrupted and continued, on tiny patches."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy import observe

from lsst.coadd.deepprior.checkpoint import CheckpointError, write_atomically, write_checkpoint
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.training import TrainingPatch, TrainSettings
from lsst.coadd.deepprior.training_data import TrainingData
from lsst.coadd.deepprior.training_run import train_network
from lsst.coadd.deepprior.weights import TrainedNetwork

SETTINGS = TrainSettings(steps=7, n_splits=2, refresh_every=2, checkpoint_every=3, base_steps=5)

STARS = [(8.0, 12.0, 300.0), (20.0, 5.0, 150.0)]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    layout = CellLayout(1, 1, 20, 28)
    patches = [
        TrainingPatch(f"patch {seed}", observe(layout, STARS, [1.6, 1.9, 2.2], seed=seed, stamp=15), layout)
        for seed in (1, 2)
    ]
    return TrainingData(patches, "two toys", "2 toy patches")


def train(
    data: TrainingData, checkpoint: Path, settings: TrainSettings = SETTINGS, **kwargs
) -> TrainedNetwork:
    return train_network(data, settings, checkpoint, {"name": "toy"}, device="cpu", **kwargs)


def interrupt(data: TrainingData, checkpoint: Path, at_step: int) -> None:
    def stop(phase: str, step: int, n_steps: int, loss: float) -> None:
        if phase == "training" and step == at_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, checkpoint, progress=stop)


def test_card_and_ranges(data: TrainingData, tmp_path: Path) -> None:
    network = train(data, tmp_path / "checkpoint")
    assert network.name == "toy"
    assert network.card["patches"] == "2 toy patches"
    assert '"steps": 7' in network.card["settings"]
    assert network.card["device"] == "cpu"
    seeing = 1.9 * np.sqrt(8 * np.log(2))
    low, high = network.ranges["seeing_pixels"]
    np.testing.assert_allclose([low, high], seeing, rtol=0.02)
    assert bool((network.trunk.exit.weight != 0.0).any())


@pytest.mark.parametrize("at_step", [2, 3, 5])
def test_continued_training_is_the_uninterrupted_one(
    data: TrainingData, tmp_path: Path, at_step: int
) -> None:
    """Interrupted before the first checkpoint, right after it, and between two."""
    expected = train(data, tmp_path / "one").to_bytes()
    checkpoint = tmp_path / "another"
    interrupt(data, checkpoint, at_step)
    assert checkpoint.exists() == (at_step > 3)
    steps = []
    network = train(data, checkpoint, progress=lambda phase, step, *_: steps.append((phase, step)))
    first = [step for phase, step in steps if phase == "training"][0]
    assert first == (4 if at_step > 3 else 1)
    assert network.to_bytes() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": dataclasses.replace(SETTINGS, seed=2)}, r"= \{'seed': 1\}, and not \{'seed': 2\}\. "),
        ({"fingerprint": "other toys"}, "with patches = two toys, and not other toys"),
    ],
)
def test_checkpoint_of_another_training_is_refused(
    data: TrainingData, tmp_path: Path, changes: dict, message: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    interrupt(data, checkpoint, 4)
    content = checkpoint.read_bytes()
    other = dataclasses.replace(data, fingerprint=changes.get("fingerprint", data.fingerprint))
    with pytest.raises(CheckpointError, match=message) as caught:
        train(other, checkpoint, changes.get("settings", SETTINGS))
    assert "--checkpoint" in str(caught.value)
    assert checkpoint.read_bytes() == content


def test_damaged_checkpoint_is_refused(data: TrainingData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    interrupt(data, checkpoint, 4)
    content = checkpoint.read_bytes()
    state = safetensors.torch.load(content)
    foreign = safetensors.torch.save({"step": torch.tensor(1)})
    lists = [safetensors.torch.save(state, {"deepprior": text}) for text in ("[1, 2]", "3", "null", "{}")]
    flipped = bytearray(content)
    flipped[-500] ^= 1
    wrongs = (b"", content[:100], content[:-1], foreign, b"SIMPLE  =" + b" " * 3000, bytes(flipped), *lists)
    for wrong in wrongs:
        checkpoint.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="is no checkpoint of a training, or damaged.*Remove it"):
            train(data, checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("weights.exit.bias"),
            "cannot be continued: The state of the training is of",
        ),
        (lambda state: state["mean.exit.bias"].fill_(np.nan), "diverged: mean.exit.bias is not finite"),
        (lambda state: state["weights.exit.bias"][0].fill_(np.inf), "weights.exit.bias is not finite"),
    ],
)
def test_impossible_checkpoint_is_refused(
    data: TrainingData, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    """States that were written as they are, and so agree with their checksum."""
    checkpoint = tmp_path / "checkpoint"
    interrupt(data, checkpoint, 4)
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        facts = json.loads(file.metadata()["deepprior"])
    state = safetensors.torch.load(checkpoint.read_bytes())
    change(state)
    del facts["sha256"]
    write_checkpoint(checkpoint, state, facts)
    with pytest.raises(CheckpointError, match=message):
        train(data, checkpoint)


def raising(error: Exception) -> Callable[..., None]:
    """Return a function that raises an error."""

    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_files_are_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~(mask := os.umask(0)) & 0o777
    os.umask(mask)

    for error, message in (
        (OSError("The disk is full."), "The disk is full."),
        (OSError(errno.ENOSPC, "No space left"), f"No space left: '{path}'"),
    ):
        monkeypatch.setattr(os, "fsync", raising(error))
        with pytest.raises(OSError, match=re.escape(message)):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
