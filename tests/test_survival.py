# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What is left of a quantum that is killed or finds its inputs damaged, and that the rerun completes.

All of it with the real pipetask on small repositories.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from run_pipetask import PIPELINE, command_of, pipetask

from lsst.daf.butler import Butler

STEPS = 200
WHERE = {"skymap": "deepprior_sim", "tract": 9, "band": "r"}
OUTPUTS = (
    "deep_prior_coadd",
    "deep_prior_residual",
    "deep_prior_coadd_outliers",
    "deep_prior_coadd_metrics",
)
AGAIN = ("--extend-run", "--skip-existing", "--clobber-outputs")

KILLED_IN_A_WRITE = """
import os, signal, sys
from pathlib import Path
import lsst.daf.butler
from lsst.ctrl.mpexec.cli.pipetask import main

where, dataset_type = sys.argv.pop(1), sys.argv.pop(1)
whole = lsst.daf.butler.FormatterV2.write

def write(self, *args, **kwargs):
    if self.dataset_ref.datasetType.name != dataset_type:
        return whole(self, *args, **kwargs)
    if where == "behind":
        whole(self, *args, **kwargs)
    else:
        self.file_descriptor.location.uri.write(b"SIMPLE  =" + bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)

lsst.daf.butler.FormatterV2.write = write
sys.exit(main())
"""
"""A pipetask that is killed while a dataset is half written, or when its file is there but not its record."""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has less room than a checkpoint takes."""
    path = tmp_path / "full"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs the right to mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def own_repo(repo: Path, tmp_path: Path) -> Path:
    """The repository for a test that writes to it."""
    return Path(shutil.copytree(repo, tmp_path / "repo"))


def arguments(repo: Path, output: str, *settings: str, where: str = "patch=0") -> list[str | Path]:
    """Return the arguments of a run of the restoration in the r band."""
    config = ("base_steps=10", "n_splits=2", "n_variance_draws=1", "device=cpu", *settings)
    return [
        *("-b", repo, "-i", "deepprior/warps", "-o", output, "-p", f"{PIPELINE}#restoration"),
        *("--register-dataset-types", "-d", f"skymap='deepprior_sim' AND band='r' AND {where}"),
        *(part for setting in config for part in ("-c", f"deepPriorCoadd:{setting}")),
    ]


def scratch(checkpoint_dir: Path | None) -> tuple[str, ...]:
    return (
        "init=scratch",
        f"steps={STEPS}",
        *(() if checkpoint_dir is None else (f"checkpoint_dir={checkpoint_dir}", "checkpoint_every=20")),
    )


def stored(repo: Path, collection: str) -> set[tuple[str, int]]:
    """Return all outputs by dataset type and patch; each of them must be readable."""
    with Butler.from_config(repo, collections=collection) as butler:
        known = set()
        for name in OUTPUTS:
            if butler.registry.queryDatasetTypes(name):
                for ref in butler.query_datasets(name, explain=False):
                    butler.get(ref)
                    known.add((name, int(ref.dataId["patch"])))
        return known


def pixels(repo: Path, collection: str, patch: int = 0) -> np.ndarray:
    with Butler.from_config(repo, collections=collection) as butler:
        coadd = butler.get("deep_prior_coadd", WHERE, patch=patch)
        return np.stack([coadd.image.array, coadd.variance.array])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_fit_goes_on(own_repo: Path, tmp_path: Path) -> None:
    """Killed twice, by kill -9 and by SIGTERM; the third run takes the remaining steps, to the same bits."""
    directory = tmp_path / "checkpoints"
    file = directory / "deepprior_sim_9_0_r.safetensors"
    run = arguments(own_repo, "u/test/killed", *scratch(directory))

    with subprocess.Popen(
        command_of("run", *run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        wait_for(file.exists, process)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert stored(own_repo, "u/test/killed") == set()

    written = file.stat().st_mtime_ns
    with subprocess.Popen(
        command_of("run", *run, *AGAIN), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        wait_for(lambda: file.stat().st_mtime_ns > written, process)
        process.terminate()
        log = process.communicate(timeout=10)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"SIGTERM: writing the checkpoint {file}" in log
    first = int(re.findall(r"The fit goes on after step (\d+)", log)[0])
    assert first >= 20
    assert first % 20 == 0
    assert stored(own_repo, "u/test/killed") == set()

    result = pipetask("run", *run, *AGAIN)
    assert result.returncode == 0, result.stdout
    second = int(re.findall(r"The fit goes on after step (\d+)", result.stdout)[0])
    assert first < second < STEPS
    assert f"The fit has {STEPS} steps, {STEPS - second} of them taken in this process" in result.stdout
    assert not file.exists()

    result = pipetask("run", *arguments(own_repo, "u/test/whole", *scratch(None)))
    assert result.returncode == 0, result.stdout
    np.testing.assert_array_equal(pixels(own_repo, "u/test/killed"), pixels(own_repo, "u/test/whole"))


def test_killed_in_the_final_write(own_repo: Path, tmp_path: Path) -> None:
    """Once with half of a file, and once with a file that no record tells of."""
    run = arguments(own_repo, "u/test/killed", *scratch(tmp_path / "checkpoints"))
    again: tuple[str, ...] = ()
    for where, dataset_type in (("within", "deep_prior_residual"), ("behind", "deep_prior_coadd")):
        command = [sys.executable, "-c", KILLED_IN_A_WRITE, where, dataset_type, "run", *run, *again]
        process = subprocess.run(list(map(str, command)), capture_output=True, check=False, timeout=300)
        assert process.returncode == -signal.SIGKILL, process.stdout
        assert (dataset_type, 0) not in stored(own_repo, "u/test/killed")
        again = AGAIN
    result = pipetask("run", *run, *AGAIN)
    assert result.returncode == 0, result.stdout
    assert f"The fit goes on after step {STEPS}" in result.stdout
    assert stored(own_repo, "u/test/killed") == {(name, 0) for name in OUTPUTS}
    assert list((tmp_path / "checkpoints").iterdir()) == []


def warp_file(repo: Path, patch: int) -> Path:
    """Return the file of one warp."""
    with Butler.from_config(repo, collections="deepprior/warps") as butler:
        refs = butler.query_datasets("deep_prior_warp", where=f"patch={patch} AND band='r'")
        return Path(butler.getURI(min(refs, key=lambda ref: ref.dataId["visit"])).ospath)


def test_damaged_and_missing_warps(own_repo: Path) -> None:
    """A damaged warp fails its patch by name, and only that; a missing one is left out, by name as well."""
    damaged, missing = warp_file(own_repo, 0), warp_file(own_repo, 1)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    missing.rename(missing.with_suffix(".away"))
    run = arguments(own_repo, "u/test/faults", "steps=2", where="patch IN (0, 1)")
    result = pipetask("run", *run, "-j", "2")
    assert result.returncode == 1, result.stdout
    assert re.search(r"The warp \{.*patch: 0, visit: \d+.*\} cannot be used", result.stdout), result.stdout
    assert re.search(r"No dataset artifact found for deep_prior_warp@\{.*patch: 1", result.stdout)
    assert "patch 1, r band: restoring from 2 of 2 warps" in result.stdout
    assert stored(own_repo, "u/test/faults") == {(name, 1) for name in OUTPUTS}

    damaged.write_bytes(content)
    result = pipetask("run", *run, *AGAIN)
    assert result.returncode == 0, result.stdout
    assert stored(own_repo, "u/test/faults") == {(name, patch) for name in OUTPUTS for patch in (0, 1)}


def short_scratch(checkpoint_dir: Path) -> tuple[str, ...]:
    return "init=scratch", "steps=4", f"checkpoint_dir={checkpoint_dir}", "checkpoint_every=2"


def test_corrupted_checkpoint(own_repo: Path, tmp_path: Path) -> None:
    """A damaged file is said to be one and the fit starts over; all outputs are there."""
    file = tmp_path / "deepprior_sim_9_0_r.safetensors"
    file.write_bytes(b"no checkpoint at all")
    result = pipetask("run", *arguments(own_repo, "u/test/damaged", *short_scratch(tmp_path)))
    assert result.returncode == 0, result.stdout
    assert f"{file} is no checkpoint of a fit, or damaged" in result.stdout
    assert "The fit has 4 steps, 4 of them taken in this process" in result.stdout
    assert stored(own_repo, "u/test/damaged") == {(name, 0) for name in OUTPUTS}
    assert not file.exists()


def test_full_disk_at_a_checkpoint(own_repo: Path, full_disk: Path) -> None:
    """The fit goes on without checkpoints, says so, and leaves nothing on the full disk."""
    result = pipetask("run", *arguments(own_repo, "u/test/full", *short_scratch(full_disk)))
    assert result.returncode == 0, result.stdout
    assert "The checkpoint cannot be written: [Errno 28] No space left on device" in result.stdout
    assert stored(own_repo, "u/test/full") == {(name, 0) for name in OUTPUTS}
    assert list(full_disk.iterdir()) == []


def test_absent_gpu(own_repo: Path) -> None:
    """The slot has a GPU that is gone: who insists on one fails, and others are told and take the CPU."""
    strict = arguments(own_repo, "u/test/strict", "steps=2", "device=cuda")
    result = pipetask("run", *strict, CUDA_VISIBLE_DEVICES="99")
    assert result.returncode == 1, result.stdout
    assert "CUDA_VISIBLE_DEVICES is 99, but no GPU can be used here" in result.stdout
    assert (
        "asks for device 'cuda', but torch finds no GPU here; ask the batch system for one" in result.stdout
    )
    assert stored(own_repo, "u/test/strict") == set()

    result = pipetask(
        "run", *arguments(own_repo, "u/test/auto", "steps=2", "device=auto"), CUDA_VISIBLE_DEVICES="99"
    )
    assert result.returncode == 0, result.stdout
    assert "CUDA_VISIBLE_DEVICES is 99, but no GPU can be used here" in result.stdout
    assert "patch 0, r band: computing on cpu." in result.stdout
    assert stored(own_repo, "u/test/auto") == {(name, 0) for name in OUTPUTS}


def test_same_bits_whatever_runs_beside(own_repo: Path) -> None:
    """One quantum at a time in one process, or each in a process of its own."""
    for output, processes in (("u/test/one", "1"), ("u/test/two", "2")):
        run = arguments(own_repo, output, "init=scratch", "steps=8", where="patch IN (0, 1)")
        result = pipetask("run", *run, "-j", processes)
        assert result.returncode == 0, result.stdout
    for patch in (0, 1):
        one, two = (pixels(own_repo, f"u/test/{name}", patch) for name in ("one", "two"))
        assert np.isfinite(one[0]).all()
        np.testing.assert_array_equal(one, two)
