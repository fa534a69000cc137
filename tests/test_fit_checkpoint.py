# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How the fit to a patch is ended and goes on, on tiny patches, without a Butler."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from toy import observe

from lsst.coadd.deepprior.checkpoint import CheckpointError
from lsst.coadd.deepprior.fit_checkpoint import (
    FitCheckpoint,
    checkpoint_file,
    inputs_digest,
    remove_checkpoint,
)
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.restore import Restoration, restore

LAYOUT = CellLayout(2, 1, 20, 33)
SETTINGS = RestoreSettings(
    steps=11, base_steps=10, n_splits=3, refresh_every=4, n_variance_draws=1, learning_rate=0.01
)
LOG = logging.getLogger("test_fit_checkpoint")


class Killed(BaseException):
    """Stands for whatever ends a process."""


class KilledCheckpoint(FitCheckpoint):
    """Is killed after some steps."""

    n_left = 10**9

    def keep(self, step: int, n_steps: int, state: dict[str, torch.Tensor]) -> None:
        super().keep(step, n_steps, state)
        self.n_left -= 1
        if self.n_left == 0:
            raise Killed


@pytest.fixture(scope="module")
def visits() -> list[Observation]:
    return observe(LAYOUT, [(15.2, 12.7, 900.0)], [1.6, 1.8, 2.0, 1.7], seed=1, masked_fraction=0.1, stamp=15)


@pytest.fixture(scope="module")
def whole(visits: list[Observation]) -> Restoration:
    """The restoration that nothing interrupts and that keeps nothing."""
    return restore(visits, LAYOUT, SETTINGS)


def checkpoint_of(
    path: Path, visits: list[Observation], settings: RestoreSettings = SETTINGS, every: int = 3
) -> KilledCheckpoint:
    facts = {"settings": dataclasses.asdict(settings), "inputs": inputs_digest(visits)}
    return KilledCheckpoint(path, every, facts, LOG)


def restore_and_be_killed(path: Path, visits: list[Observation], n_steps: int, every: int = 3) -> None:
    checkpoint = checkpoint_of(path, visits, every=every)
    checkpoint.n_left = n_steps
    with pytest.raises(Killed):
        restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint)


def steps_taken(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(n) for n in re.findall(r"has 11 steps, (\d+) of them taken in this process", caplog.text)]


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


@pytest.mark.parametrize("n_steps", [2, 4, 7, 11])
def test_killed_fit_goes_on_as_if_nothing_had_happened(
    visits: list[Observation],
    whole: Restoration,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    n_steps: int,
) -> None:
    """Killed before the first file, within and at the end of a linearisation, and after the last step."""
    path = tmp_path / "deeper" / "fit"
    restore_and_be_killed(path, visits, n_steps)
    (path.parent / ".fit.abc123").write_bytes(b"killed while it wrote")
    caplog.clear()
    again = restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint_of(path, visits))
    kept = {2: 0, 4: 3, 7: 6, 11: 11}[n_steps]
    assert steps_taken(caplog) == ([11 - kept] if kept < 11 else [])
    assert (f"The fit goes on after step {kept} from {path}" in caplog.text) == (kept > 0)
    np.testing.assert_array_equal(again.image, whole.image)
    np.testing.assert_array_equal(again.variance, whole.variance)
    assert list(path.parent.iterdir()) == [path]
    assert again.curves["fit_step"] == whole.curves["fit_step"] == [0.0, 4.0, 8.0, 11.0]
    assert again.curves["held_out"] == whole.curves["held_out"]


def test_killed_several_times(
    visits: list[Observation], whole: Restoration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where every step is written, so that the fit goes on in the middle of an epoch of splits."""
    path = tmp_path / "fit"
    for n_steps in (1, 4, 1):
        restore_and_be_killed(path, visits, n_steps, every=1)
    again = restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint_of(path, visits))
    assert steps_taken(caplog) == [5]
    np.testing.assert_array_equal(again.image, whole.image)


def test_inputs_digest_tells_visits_apart(visits: list[Observation]) -> None:
    digest = inputs_digest(visits)
    assert inputs_digest(list(visits)) == digest
    flux = np.nextafter(visits[1].flux, np.float32(np.inf))
    good = visits[1].good.copy()
    good[tuple(np.argwhere(good)[0])] = False
    changes = (
        {"flux": flux},
        {"variance": 1.01 * visits[1].variance},
        {"good": good},
        {"psf": 1.01 * visits[1].psf},
        {"origin": (0, 1)},
        {"name": "other"},
        {"noise": visits[2].flux},
        {"noise": visits[3].flux},
        {"sampling": 2},
    )
    digests = {
        inputs_digest([visits[0], dataclasses.replace(visits[1], **change), *visits[2:]])
        for change in changes
    }
    assert len({digest, *digests}) == 1 + len(changes)
    assert inputs_digest([visits[1], visits[0], *visits[2:]]) != digest
    assert inputs_digest(visits[:3]) != digest


@pytest.mark.parametrize("changed", ["settings", "inputs"])
def test_checkpoint_of_another_fit_is_refused(
    visits: list[Observation], tmp_path: Path, changed: str
) -> None:
    path = tmp_path / "fit"
    restore_and_be_killed(path, visits, 5)
    content = path.read_bytes()
    settings = dataclasses.replace(SETTINGS, seed=2) if changed == "settings" else SETTINGS
    others = visits if changed == "settings" else visits[:3]
    with pytest.raises(CheckpointError, match=f"belongs to a fit with {changed} = .*checkpoint_dir"):
        restore(others, LAYOUT, settings, checkpoint=checkpoint_of(path, others, settings))
    assert path.read_bytes() == content


def test_damaged_checkpoint_is_said_to_be_one_and_the_fit_starts_over(
    visits: list[Observation], whole: Restoration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "fit"
    restore_and_be_killed(path, visits, 4)
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    for wrong in (bytes(content), bytes(content[:1000]), b""):
        path.write_bytes(wrong)
        assert checkpoint_of(path, visits).load() is None
        assert f"{path} is no checkpoint of a fit, or damaged" in caplog.text
        assert "The fit starts over." in caplog.text
        caplog.clear()
    again = restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint_of(path, visits))
    assert steps_taken(caplog) == [11]
    np.testing.assert_array_equal(again.image, whole.image)


def test_no_pickle(visits: list[Observation], tmp_path: Path) -> None:
    """The file is safetensors with the facts as JSON, and of a size that has nothing to do with the patch."""
    path = tmp_path / "fit"
    restore_and_be_killed(path, visits, 4)
    with safetensors.safe_open(path, framework="pt") as file:
        assert '"steps": 11' in file.metadata()["deepprior"]
        assert {"step", "generator", "order", "curve"} < set(file.keys())
        n_weights = sum(file.get_slice(k).get_shape() != [] for k in file.keys() if "weights." in k)
    assert n_weights > 0
    assert path.stat().st_size < 6e6


def test_full_disk_does_not_end_the_fit(
    visits: list[Observation], whole: Restoration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that has less room than a checkpoint takes."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", full], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs the right to mount: {mounted.stderr.decode().strip()}")
    try:
        result = restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint_of(full / "fit", visits))
        assert list(full.iterdir()) == []
    finally:
        subprocess.run(["umount", full], check=True)
    assert f"The checkpoint cannot be written: [Errno {errno.ENOSPC}] No space left" in caplog.text
    assert str(full / "fit") in caplog.text
    np.testing.assert_array_equal(result.image, whole.image)


def test_failed_write_keeps_the_old_file(
    visits: list[Observation],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "fit"
    restore_and_be_killed(path, visits, 4)
    content = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    restore(visits, LAYOUT, SETTINGS, checkpoint=checkpoint_of(path, visits))
    assert "cannot be written" in caplog.text
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger(__name__)
    (tmp_path / "fit").touch()
    remove_checkpoint(tmp_path / "fit", log)
    remove_checkpoint(tmp_path / "fit", log)
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records
    remove_checkpoint(tmp_path, log)  # a directory cannot be unlinked, whoever runs the test
    assert "cannot be removed" in caplog.text
    assert str(tmp_path) in caplog.text


def test_a_left_over_that_cannot_be_removed_is_left(tmp_path: Path) -> None:
    (tmp_path / ".fit.left").touch()
    (tmp_path / ".fit.over").mkdir()  # a directory cannot be unlinked, whoever runs the test
    assert FitCheckpoint(tmp_path / "fit", 1, {}, LOG).load() is None
    assert [path.name for path in tmp_path.iterdir()] == [".fit.over"]


def test_a_file_is_that_of_the_fit_that_reads_or_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    first, again, other = (FitCheckpoint(path, 1, {"seed": seed}, LOG) for seed in (1, 1, 2))
    assert first.load() is None
    assert first.own_file is None
    first.keep(1, 2, {"weights": torch.ones(1)})
    assert first.own_file == path
    assert again.load() is not None
    assert again.own_file == path
    with pytest.raises(CheckpointError):
        other.load()
    assert other.own_file is None


def test_file_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = checkpoint_file("$SCRATCH/fits", ("maps/lsst_v1", 9813, 42, "i"))
    assert path == Path("/scratch/me/fits/maps%2Flsst_v1_9813_42_i.safetensors")
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(RuntimeError, match="checkpoint_dir = '.SCRATCH/fits' has an environment variable"):
        checkpoint_file("$SCRATCH/fits", ("map", 1, 2, "r"))


def test_a_checkpoint_is_never_written_less_often_than_never(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not every 0"):
        FitCheckpoint(tmp_path / "fit", 0, {}, LOG)


BUSY = """
import logging, os, signal, sys, time
from pathlib import Path
import torch
from lsst.coadd.deepprior.fit_checkpoint import FitCheckpoint

logging.basicConfig(level=logging.INFO)
checkpoint = FitCheckpoint(Path(sys.argv[1]), 1000, {}, logging.getLogger())
if sys.argv[2] == "own handler":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with checkpoint.guard():
    checkpoint.keep(1, 2000, {"weights": torch.ones(3)})
    print("ready", flush=True)
    # One call that takes a minute, in which Python runs no handler of signals.
    if sys.argv[2] == "long step":
        torch.linalg.svd(torch.randn(6000, 6000))
    time.sleep(60)
"""


@pytest.mark.parametrize(("situation", "status"), [("long step", 143), ("own handler", 7)])
def test_sigterm(tmp_path: Path, situation: str, status: int) -> None:
    """Within a step the state is written at once; a handler that was there keeps its right."""
    path = tmp_path / "fit"
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(path), situation], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        _, messages = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == status
    assert path.exists() == (situation == "long step")
    if situation == "long step":
        assert f"SIGTERM: writing the checkpoint {path}".encode() in messages
        assert int(safetensors.torch.load(path.read_bytes())["step"]) == 1
