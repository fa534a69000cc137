# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Training from files, repositories and scenes, on tiny patches, and how it is interrupted and continued."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from astropy.io import fits
from click.testing import CliRunner, Result
from rich.console import Console
from toy import observe

from lsst.coadd.deepprior import families, training
from lsst.coadd.deepprior import train_command as train_command_module
from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.network_dataset import NETWORK_DATASET_TYPE, network_from_dataset
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.simulate import SceneConfig
from lsst.coadd.deepprior.train_command import train_command
from lsst.coadd.deepprior.training import TrainingPatch, TrainSettings
from lsst.coadd.deepprior.training_data import (
    TrainingData,
    TrainingDataError,
    butler_data,
    file_data,
    scene_data,
)
from lsst.coadd.deepprior.training_run import CheckpointError, train_network, write_atomically
from lsst.coadd.deepprior.weights import InvalidNetworkError, TrainedNetwork
from lsst.daf.butler import Butler

SETTINGS = TrainSettings(steps=7, n_splits=2, refresh_every=2, checkpoint_every=3, base_steps=5)

STARS = [(8.0, 12.0, 300.0), (20.0, 5.0, 150.0)]


def silent(phase: str, n_done: int, n_all: int) -> None:
    pass


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
        ({"settings": dataclasses.replace(SETTINGS, seed=2)}, "with settings = .*'seed': 1.*not .*'seed': 2"),
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
    foreign = safetensors.torch.save({"step": torch.tensor(1)})
    state = safetensors.torch.load(content)
    del state["weights.exit.bias"]
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        facts = file.metadata()
    checkpoint.write_bytes(safetensors.torch.save(state, facts))
    with pytest.raises(CheckpointError, match="cannot be continued: The state of the training is of another"):
        train(data, checkpoint)
    for wrong in (b"", content[:100], content[:-1], foreign, b"SIMPLE  =" + b" " * 3000):
        checkpoint.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="is no checkpoint of a training, or damaged"):
            train(data, checkpoint)


def test_files_are_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~(mask := os.umask(0)) & 0o777
    os.umask(mask)

    def fail(handle: int) -> None:
        raise OSError("The disk is full.")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_of_files_and_of_a_repository_are_the_same(warp_files: list[Path], repo: Path) -> None:
    with (
        file_data(warp_files, None, silent) as from_files,
        butler_data(repo, "deepprior/warps", None, silent) as from_repo,
    ):
        assert from_files.description == from_repo.description == "12 warps of 4 patches and bands"
        assert len(from_files.patches) == len(from_repo.patches) == 4
        for one, other in zip(from_files.patches, from_repo.patches, strict=True):
            assert one.name == other.name
            assert one.layout == other.layout == CellLayout(2, 3, 32, 32)
            for mine, theirs in zip(one.observations, other.observations, strict=True):
                assert (mine.name, mine.origin) == (theirs.name, theirs.origin)
                np.testing.assert_array_equal(mine.flux, theirs.flux)
                np.testing.assert_array_equal(mine.good, theirs.good)
                assert not mine.good.all()
        names = [patch.name for patch in from_files.patches]
        assert names == sorted(names)
        assert names[-1] == "skymap deepprior_sim, tract 9, patch 1, band r"


def test_fingerprints(warp_files: list[Path], repo: Path, tmp_path: Path) -> None:
    """They depend on the content of the files, and neither on their order nor on their place."""

    def fingerprint(files: list[Path], target: float | None = None) -> str:
        with file_data(files, target, silent) as data:
            return data.fingerprint

    few = warp_files[:2]
    moved = [Path(shutil.copy(file, tmp_path / f"{k}.fits")) for k, file in enumerate(few)]
    expected = fingerprint(few)
    assert fingerprint(moved[::-1]) == expected
    assert fingerprint(few, 2.5) != expected
    with fits.open(moved[1], mode="update") as hdus:
        hdus["IMAGE"].data[20, 20] += 1.0
    assert fingerprint(moved) != expected
    with butler_data(repo, "deepprior/warps", None, silent) as one:
        with butler_data(repo, "deepprior/warps", None, silent) as again:
            assert one.fingerprint == again.fingerprint


def test_patches_with_one_usable_warp_are_left_out(warp_files: list[Path], tmp_path: Path) -> None:
    one_patch = [file for file in warp_files if file.name.startswith("warp_0_r")]
    assert len(one_patch) == 3
    spoiled = [Path(shutil.copy(file, tmp_path)) for file in one_patch]
    for file in spoiled[1:]:
        with fits.open(file, mode="update") as hdus:
            hdus["IMAGE"].data[:] = np.nan
    with pytest.raises(TrainingDataError, match="no patch and band of which two warps have usable pixels"):
        with file_data(spoiled, None, silent):
            pass
    with file_data([one_patch[0], one_patch[1], spoiled[2]], None, silent) as data:
        assert data.description == "2 warps of 1 patches and bands"


def tiny_scene(seed: int) -> SceneConfig:
    return SceneConfig(seed=seed, n_cells=(1, 2), cell_shape=(32, 24), n_visits=3, psf_size=15)


def test_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "training_scene", tiny_scene)
    one, more, other = scene_data(1, 1, silent), scene_data(2, 1, silent), scene_data(1, 2, silent)
    assert len({one.fingerprint, more.fingerprint, other.fingerprint}) == 3
    first, again, different = one.patches[0], more.patches[0], other.patches[0]
    assert first.layout == CellLayout(1, 2, 32, 24)
    assert len(first.observations) == 3
    assert first.target_fwhm == again.target_fwhm != different.target_fwhm
    np.testing.assert_array_equal(first.observations[1].flux, again.observations[1].flux)
    assert not np.array_equal(first.observations[1].flux, different.observations[1].flux)
    assert not np.array_equal(first.observations[1].flux, more.patches[1].observations[1].flux)
    for patch in (first, different, more.patches[1]):
        assert 1.8 <= patch.target_fwhm < max(observation.seeing() for observation in patch.observations)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training as the command does it, with a base of few steps."""
    settings = functools.partial(TrainSettings, base_steps=5, n_splits=2, checkpoint_every=3)
    monkeypatch.setattr(training, "TrainSettings", settings)


def deepprior(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_default_number_of_steps() -> None:
    (steps,) = (parameter for parameter in train_command.params if parameter.name == "steps")
    assert steps.default == TrainSettings().steps


@pytest.mark.usefixtures("quick")
def test_train_on_files_and_ingest(warp_files: list[Path], repo: Path, tmp_path: Path) -> None:
    files = [file for file in warp_files if file.name.startswith("warp_1_i")]
    output = tmp_path / "own.safetensors"
    options = ["--steps", 4, "--seed", 7, "--device", "cpu", "--target-fwhm", 2.2]
    result = deepprior("train", output, *files, *options)
    assert result.exit_code == 0, result.output
    assert f"The network own of 3 warps of 1 patches and bands is in {output}." in result.output
    assert "training: 4 of 4, loss " in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
    network = TrainedNetwork.from_bytes(output.read_bytes())
    assert network.card["command"] == "deepprior train OUTPUT FILE... --target-fwhm 2.2 --seed 7 --steps 4"
    np.testing.assert_allclose(network.ranges["target_pixels"], 2.2)

    own_repo = tmp_path / "repo"
    shutil.copytree(repo, own_repo)
    for word in ("now", "already"):
        result = deepprior("ingest-network", own_repo, output, "--run", "u/me/network")
        assert result.exit_code == 0, result.output
        assert f"The network own is {word} in u/me/network of {own_repo}." in result.output
    dataset = Butler.from_config(own_repo).get(NETWORK_DATASET_TYPE, collections="u/me/network")
    assert network_from_dataset(dataset).sha256 == network.sha256


@pytest.mark.usefixtures("quick")
def test_train_on_a_repository(repo: Path, tmp_path: Path) -> None:
    output = tmp_path / "own.safetensors"
    result = deepprior("train", output, "--repo", repo, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    network = TrainedNetwork.from_bytes(output.read_bytes())
    assert network.card["patches"] == "12 warps of 4 patches and bands"
    expected = "deepprior train OUTPUT --repo REPO --collection deepprior/warps --seed 1 --steps 2"
    assert network.card["command"] == expected


@pytest.mark.usefixtures("quick")
def test_interrupted_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "training_scene", tiny_scene)
    command = ["--scenes", 1, "--steps", 5, "--device", "cpu"]
    assert deepprior("train", tmp_path / "one" / "net", *command).exit_code == 1
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert deepprior("train", tmp_path / "one" / "net", *command).exit_code == 0

    with monkeypatch.context() as patch:

        def stop(self: training.Trainer, card: dict[str, str]) -> TrainedNetwork:
            raise FloatingPointError("The training diverged.")

        patch.setattr(training.Trainer, "network", stop)
        result = deepprior("train", tmp_path / "two" / "net", *command)
    assert result.exit_code == 1
    assert "The training has failed: The training diverged." in result.output
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["net.checkpoint"]
    result = deepprior("train", tmp_path / "two" / "net", "--scenes", 2, "--steps", 5, "--device", "cpu")
    assert result.exit_code == 1
    assert "belongs to a training with patches = 1 scenes of seed 1" in result.output
    result = deepprior("train", tmp_path / "two" / "net", *command)
    assert result.exit_code == 0, result.output
    assert "training: 4 of 5" in result.output
    assert "training: 1 of 5" not in result.output
    assert (tmp_path / "one" / "net").read_bytes() == (tmp_path / "two" / "net").read_bytes()


@pytest.mark.parametrize(
    "sources",
    [[], ["--scenes", 1, "--repo", "repo"], ["file.fits", "--repo", "repo"], ["file.fits", "--scenes", 1]],
)
def test_train_needs_one_source(tmp_path: Path, sources: list[object]) -> None:
    result = deepprior("train", tmp_path / "net", *sources)
    assert result.exit_code == 2
    assert "Give one of --repo, warp FILEs, and --scenes." in result.output


def test_scenes_have_their_own_targets(tmp_path: Path) -> None:
    result = deepprior("train", tmp_path / "net", "--scenes", 1, "--target-fwhm", 2.5)
    assert result.exit_code == 2
    assert "leave out --target-fwhm" in result.output


def test_train_refusals(repo: Path, warp_files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "net"
    (tmp_path / "text.fits").write_text("This is no FITS file.")
    for arguments, message in (
        ([tmp_path / "none.fits"], "none.fits: there is no such file"),
        ([tmp_path / "text.fits"], "text.fits: it is not a complete FITS file"),
        (["--repo", tmp_path], "cannot be read"),
        (["--repo", repo, "--collection", "nothing"], "The collection nothing of"),
        (["--repo", repo, "--target-fwhm", 50], "is not sharper than the worst visit"),
        ([*warp_files[:2], "--checkpoint", tmp_path / "a" / "b"], "is no writable folder"),
    ):
        result = deepprior("train", output, *arguments, "--device", "cpu")
        assert result.exit_code == 1, arguments
        assert message in result.output
        assert result.output.splitlines()[-1].startswith("Error: ")
        assert not output.exists()


def test_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = deepprior("train", tmp_path / "net", "--scenes", 1, "--device", "cuda")
    assert result.exit_code == 1
    assert "torch finds no GPU here" in result.output


def test_ingest_network_refusals(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is no network.")
    for file, message in ((tmp_path / "text", "text: "), (tmp_path / "none", "none cannot be read: No such")):
        result = deepprior("ingest-network", repo, file)
        assert result.exit_code == 1
        assert message in result.output
    with pytest.raises(InvalidNetworkError):
        TrainedNetwork.from_bytes((tmp_path / "text").read_bytes())


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(train_command_module, "Console", lambda **_: console)
    with train_command_module.show_progress() as report:
        report("reading patches", 2, 2)
        for step in range(6, 9):
            report("training", step, 8, 0.1 * step)
    lines = terminal.getvalue().splitlines()
    (*_, reading) = (line for line in lines if "reading patches" in line)
    (*_, running) = (line for line in lines if "training" in line)
    assert "━ 2/2" in reading
    assert "loss" not in reading
    assert "━ 8/8 loss 0.8" in running


def test_progress_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line in ten seconds; steps from before an interruption do not shorten the time that is left."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(train_command_module.time, "monotonic", lambda: float(next(clock)))
    with train_command_module.show_progress() as report:
        report("reading patches", 1, 1)
        for step in range(101, 108):
            report("training", step, 110, 0.5)
        report("training", 110, 110, 0.25)
    assert capsys.readouterr().err.splitlines() == [
        "reading patches: 1 of 1",
        "training: 101 of 110, loss 0.5",
        "training: 104 of 110, loss 0.5, 24 s left",
        "training: 107 of 110, loss 0.5, 12 s left",
        "training: 110 of 110, loss 0.25",
    ]
