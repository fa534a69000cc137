# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Training from files, repositories and scenes, on tiny patches, and what the command refuses."""

from __future__ import annotations

import errno
import functools
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner, Result
from rich.console import Console

from lsst.coadd.deepprior import families, progress, training, training_data
from lsst.coadd.deepprior import train_command as train_command_module
from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.network_dataset import NETWORK_DATASET_TYPE, network_from_dataset
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.simulate import SceneConfig
from lsst.coadd.deepprior.train_command import train_command
from lsst.coadd.deepprior.training import TrainSettings
from lsst.coadd.deepprior.training_data import (
    TrainingDataError,
    butler_data,
    file_data,
    scene_data,
)
from lsst.coadd.deepprior.weights import InvalidNetworkError, TrainedNetwork
from lsst.daf.butler import Butler


def silent(phase: str, n_done: int, n_all: int) -> None:
    pass


def raising(error: Exception) -> Callable[..., None]:
    """Return a function that raises an error."""

    def fail(*arguments: object) -> None:
        raise error

    return fail


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
        assert data.description == "2 warps of 1 patch and band"
        assert data.left_out == ()


def test_a_flat_psf_is_refused(warp_files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Observation, "seeing", raising(ValueError("visit 3000: No Gaussian fits.")))
    with pytest.raises(TrainingDataError, match="tract 9, patch 0, band r: visit 3000: No Gaussian fits"):
        with file_data(warp_files[:2], None, silent):
            pass


@pytest.mark.usefixtures("quick")
def test_good_pixels_count_only_in_cells_with_a_psf(warp_files: list[Path], tmp_path: Path) -> None:
    """A patch of which one warp is left goes out with a message, and the training takes the others."""
    poor = [file for file in warp_files if file.name.startswith("warp_0_r")]
    good = [file for file in warp_files if file.name.startswith("warp_1_r")]
    spoiled = [Path(shutil.copy(file, tmp_path)) for file in poor]
    for file in spoiled[1:]:
        with fits.open(file, mode="update") as hdus:
            stamp = hdus["PSF"].data.reshape(-1, *hdus["PSF"].data.shape[-2:])[0]
            hdus["PSF"].data = np.full((2, 3, *stamp.shape), np.nan, dtype=stamp.dtype)
            hdus["PSF"].data[0, 0] = stamp
            hdus["IMAGE"].data[:32, :32] = np.nan
            assert np.isfinite(hdus["IMAGE"].data).any()
    message = "skymap deepprior_sim, tract 9, patch 0, band r is left out: fewer than two of its warps have"
    with file_data([*spoiled, *good], None, silent) as data:
        assert data.description == "3 warps of 1 patch and band"
        (reason,) = data.left_out
        assert reason.startswith(message)
    result = deepprior("train", tmp_path / "net", *spoiled, *good, "--steps", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert message in result.output


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
    assert f"The network own of 3 warps of 1 patch and band is in {output}." in result.output
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


@pytest.mark.usefixtures("quick")
def test_checkpoint_that_cannot_be_continued_is_refused_before_scenes_are_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "training_scene", tiny_scene)
    output, checkpoint = tmp_path / "net", tmp_path / "net.checkpoint"
    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: None if path == checkpoint else unlink(path))
        assert deepprior("train", output, "--scenes", 1, "--steps", 4, "--device", "cpu").exit_code == 0
    content = checkpoint.read_bytes()
    for data, steps, message in (
        (content[:-1], 4, "is no checkpoint of a training, or damaged"),
        (content, 6, "belongs to a training with settings = {'steps': 4}, and not {'steps': 6}"),
    ):
        checkpoint.write_bytes(data)
        result = deepprior("train", output, "--scenes", 1, "--steps", steps, "--device", "cpu")
        assert result.exit_code == 1
        assert message in result.output
        assert "simulating scenes" not in result.output
        assert checkpoint.read_bytes() == data


@pytest.mark.usefixtures("quick")
def test_finished_network_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is removed; one that was killed between its last two steps ends them."""
    monkeypatch.setattr(families, "training_scene", tiny_scene)
    output, checkpoint = tmp_path / "net", tmp_path / "net.checkpoint"
    command = ["train", output, "--scenes", 1, "--steps", 4, "--device", "cpu"]
    output.write_text("An hour of work.")
    result = deepprior(*command)
    assert result.exit_code == 1
    assert f"{output} exists, and there is no {checkpoint} to continue from; remove it" in result.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["An hour of work."]
    output.unlink()
    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: None if path == checkpoint else unlink(path))
        assert deepprior(*command).exit_code == 0
    assert checkpoint.exists()
    assert deepprior(*command).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


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


@pytest.mark.parametrize("sources", [["--scenes", 1], ["file.fits"]])
def test_collection_needs_a_repository(tmp_path: Path, sources: list[object]) -> None:
    result = deepprior("train", tmp_path / "net", *sources, "--collection", "any", "--steps", 1)
    assert result.exit_code == 2
    assert "give --repo" in result.output


@pytest.mark.usefixtures("quick")
def test_no_file_is_read_and_written(
    warp_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file is called: relatively, absolutely, or through a link."""
    (tmp_path / "a").mkdir()
    copies = [Path(shutil.copy(file, tmp_path)) for file in warp_files[:2]]
    contents = [file.read_bytes() for file in copies]
    (tmp_path / "link").symlink_to(copies[1])
    (tmp_path / "net.checkpoint").symlink_to(copies[0])
    monkeypatch.chdir(tmp_path)
    for output, *arguments in (
        ["own", "--checkpoint", "own"],
        ["own", "--checkpoint", tmp_path / "own"],
        [tmp_path / "a" / ".." / "own", "--checkpoint", "own"],
        [copies[0].name],
        ["link"],
        ["net"],
        ["own", "--checkpoint", "link"],
    ):
        result = deepprior("train", output, *copies, *arguments, "--steps", 1, "--device", "cpu")
        assert result.exit_code == 2, (output, arguments)
        assert "name another file" in result.output or "name two" in result.output
        assert not (tmp_path / "own").exists()
    assert [file.read_bytes() for file in copies] == contents


@pytest.mark.usefixtures("quick")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "training_scene", tiny_scene)
    reader = "lsst.coadd.deepprior.train_command.scene_data"
    checkpoint = tmp_path / "net.checkpoint"
    for name, error, message in (
        (
            "os.fsync",
            OSError(errno.ENOSPC, "No space left"),
            f"{checkpoint} cannot be read or written: No space",
        ),
        (reader, OSError(errno.ENOSPC, "No space left"), "A file cannot be read or written: No space left."),
        (reader, OSError("Why"), "A file cannot be read or written: Why."),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, raising(error))
            result = deepprior("train", tmp_path / "net", "--scenes", 1, "--steps", 3, "--device", "cpu")
        assert result.exit_code == 1
        assert f"Error: {message}" in result.output
        assert "None" not in result.output
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_warps_that_vanish_during_the_training(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_repo = tmp_path / "repo"
    shutil.copytree(repo, own_repo)
    prepare = training.Trainer.__init__

    def lose(*arguments: object, **settings: object) -> None:
        for file in (own_repo / "deepprior" / "warps").rglob("*.fits"):
            file.unlink()
        prepare(*arguments, **settings)

    monkeypatch.setattr(training_data, "_CACHE_BYTES", 0)
    monkeypatch.setattr(training.Trainer, "__init__", lose)
    result = deepprior("train", tmp_path / "net", "--repo", own_repo, "--steps", 2, "--device", "cpu")
    assert result.exit_code == 1
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert error.startswith("Error: The warp {")
    assert "visit: " in error
    assert "cannot be used" in error


def test_train_refusals(repo: Path, warp_files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "net"
    (tmp_path / "text.fits").write_text("This is no FITS file.")
    for arguments, message in (
        ([tmp_path / "none.fits"], "none.fits: there is no such file"),
        ([tmp_path / "text.fits"], "text.fits: it is not a complete FITS file"),
        (["--repo", tmp_path], f"{tmp_path} cannot be opened as a Butler repository"),
        (["--repo", repo, "--collection", "nothing"], "The collection nothing of"),
        (["--repo", repo, "--collection", "deepprior/*"], "deepprior/* is no name of a collection"),
        (
            ["--repo", repo, "--target-fwhm", 50],
            "patch 0, band i: A target PSF with FWHM 50.00 pixels is not",
        ),
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
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with train_command_module.show_progress() as report:
        report("reading patches", 1, 1)
        for step in range(101, 108):
            report("training", step, 110, 0.5)
        report("training", 110, 110, 0.25)
        report("noise", 1, 4, 0.125)
    assert capsys.readouterr().err.splitlines() == [
        "reading patches: 1 of 1",
        "training: 101 of 110, loss 0.5",
        "training: 104 of 110, loss 0.5, 24 s left",
        "training: 107 of 110, loss 0.5, 12 s left",
        "training: 110 of 110, loss 0.25",
        "noise: 1 of 4, rms 0.125 nJy",
    ]


def test_time_left_of_a_fit_that_begins_anew_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    report = progress.ProgressLines(lines.append)
    for now, step in ((0.0, 0), (1000.0, 100), (1001.0, 0), (1101.0, 10)):
        monkeypatch.setattr(progress.time, "monotonic", lambda now=now: now)
        report("fit", step, 100, 0.5)
    assert lines[2:] == ["fit: 0 of 100, loss 0.5", "fit: 10 of 100, loss 0.5, 900 s left"]


@pytest.mark.parametrize(
    ("phase", "number"), [("noise", "rms 0.25 nJy"), ("noise i", "rms 0.25 nJy"), ("fit i", "loss 0.25")]
)
def test_what_progress_calls_its_number(phase: str, number: str) -> None:
    """With several bands the band is behind the phase."""
    lines: list[str] = []
    progress.ProgressLines(lines.append)(phase, 1, 4, 0.25)
    assert lines == [f"{phase}: 1 of 4, {number}"]
