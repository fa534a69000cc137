# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The pipeline through BPS, on Parsl without and with a real Slurm, against pipetask."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from run_pipetask import PIPELINE, pipetask

from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.ingest import ingest_warp_files
from lsst.coadd.deepprior.simulate import SceneConfig, write_scene
from lsst.ctrl.bps import BPS_DEFAULTS, BPS_SEARCH_ORDER, BpsConfig
from lsst.daf.butler import Butler, Config

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "config/bps"
TEMPLATES = "resource://lsst.coadd.deepprior/resources/config/bps"
PATCHES = range(4)
BANDS = ("r", "i")
STEPS = 40
CONFIG = ("init=scratch", f"steps={STEPS}", "base_steps=10", "n_splits=2", "n_variance_draws=1", "device=cpu")
_PATIENCE = 1200.0
"""Seconds after which a submission counts as stuck; it takes one or two minutes."""

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")


@pytest.fixture(scope="module")
def four_patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of four patches in two bands, with what pipetask makes of them in u/test/pipetask."""
    folder = tmp_path_factory.mktemp("bps")
    files = []
    for patch in PATCHES:
        config = SceneConfig(
            seed=6,
            patch_id=patch,
            n_cells=(2, 2),
            cell_shape=(36, 36),
            start=(14200, 15600 + 72 * patch),
            n_visits=3,
            psf_size=15,
        )
        files += write_scene(folder / "warps", config, BANDS)
    ingest_warp_files(folder / "repo", files)
    result = pipetask(
        *("run", "-b", folder / "repo", "-i", "deepprior/warps", "-o", "u/test/pipetask", "-p", PIPELINE),
        "--register-dataset-types",
        *(part for setting in CONFIG for part in ("-c", f"deepPriorCoadd:{setting}")),
        timeout=_PATIENCE,
    )
    assert result.returncode == 0, result.stdout
    assert "Executed 24 quanta successfully, 0 failed" in result.stdout
    return folder / "repo"


def submission(repo: Path, folder: Path, template: str, site: dict[str, object], *config: str) -> list[str]:
    """Write a submission as a user does, and return the command.

    With Slurm both bands of a patch are one job, which saves time.
    """
    (name,) = {"parsl_local.yaml": ["local"], "parsl_slurm.yaml": ["slurm"]}[template]
    text = yaml.safe_dump(
        {
            "includeConfigs": [f"{TEMPLATES}/{template}"],
            "operator": "test",
            "payload": {"payloadName": name, "butlerConfig": str(repo)},
            "extraQgraphOptions": " ".join(f"-c deepPriorCoadd:{one}" for one in (*CONFIG, *config)),
            "site": {name: site},
            **(
                {"cluster": {"patchAndBand": {"dimensions": "skymap, tract, patch"}}}
                if name == "slurm"
                else {}
            ),
        }
    )
    (folder / "submit.yaml").write_text(text)
    return [str(Path(sys.executable).with_name("bps")), "submit", str(folder / "submit.yaml")]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a command in a folder; BPS puts its files where PWD says."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return (
        os.environ
        | {"PATH": path, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "PWD": str(folder)}
        | variables
    )


def contents(repo: Path, collection: str) -> dict[tuple[int, str], list[np.ndarray]]:
    """Return the numbers of all restorations: images, variances, fluxes; figures must be there."""
    result = {}
    with Butler.from_config(repo, collections=collection) as butler:
        for ref in butler.query_datasets("deep_prior_coadd"):
            coadd, residual, sources = (
                butler.get(name, ref.dataId)
                for name in ("deep_prior_coadd", "deep_prior_residual", "deep_prior_coadd_sources")
            )
            assert butler.getURI("deep_prior_coadd_plot", ref.dataId).exists()
            result[int(ref.dataId["patch"]), str(ref.dataId["band"])] = [
                *(plane.array for one in (coadd, residual) for plane in (one.image, one.variance)),
                *(np.asarray(sources[name]) for name in ("x", "y", "flux", "flux_err")),
            ]
    return result


def assert_same(repo: Path, collection: str, missing: set[tuple[int, str]]) -> None:
    """Compare bit by bit with what pipetask has made."""
    expected, found = contents(repo, "u/test/pipetask"), contents(repo, collection)
    assert expected.keys() == {(patch, band) for patch in PATCHES for band in BANDS}
    assert found.keys() == expected.keys() - missing
    for key, arrays in found.items():
        for one, other in zip(arrays, expected[key], strict=True):
            np.testing.assert_array_equal(one, other)


def test_parsl_on_this_machine(four_patches: Path, tmp_path: Path) -> None:
    """A patch that fails takes no other with it, and the report names it, while bps ends with status 0."""
    repo = Path(shutil.copytree(four_patches, tmp_path / "repo"))
    with Butler.from_config(repo, collections="deepprior/warps") as butler:
        ref = butler.query_datasets("deep_prior_warp", where="patch=3 AND band='r'")[0]
        damaged = Path(butler.getURI(ref).ospath)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    site = {"class": "bps_sites.LoopbackLocal", "cores": 2, "retries": 0}
    command = submission(repo, tmp_path, "parsl_local.yaml", site)
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, timeout=_PATIENCE
    )
    assert result.returncode == 0, result.stderr.decode()
    assert_same(repo, "u/test/local", {(3, "r")})
    (graph,) = tmp_path.glob("submit/u/test/local/*/*.qg")
    result = pipetask("report", repo, graph, "--full-output-filename", tmp_path / "report.yaml")
    assert result.returncode == 0, result.stdout
    report = yaml.safe_load((tmp_path / "report.yaml").read_text())
    (failed,) = report["deepPriorCoadd"]["failed_quanta"].values()
    assert failed["data_id"] == {"skymap": "deepprior_sim", "tract": 9, "patch": 3, "band": "r"}
    assert "visit: 3000" in failed["error"][0]
    assert "cannot be used" in failed["error"][0]
    assert report["plotDeepPriorCoadd"]["n_quanta_blocked"] == 1
    assert report["plotDeepPriorCoadd"]["n_succeeded"] == 7


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[str]:
    """A Slurm of one node; the path of its configuration."""
    absent = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    if absent:
        pytest.skip(f"a real Slurm needs {', '.join(absent)}: 'apt-get install slurm-wlm munge' as root")
    if os.geteuid() != 0:
        pytest.skip("the Slurm of the tests is started by root")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        with contextlib.suppress(OSError):
            other.bind(("127.0.0.1", port + 1))
    folder = tmp_path / "slurm"
    script = ["sh", str(TESTS / "slurm.sh")]
    try:
        subprocess.run([*script, "start", str(folder), str(port)], check=True, timeout=60)
        yield str(folder / "slurm.conf")
    finally:
        subprocess.run([*script, "stop", str(folder)], check=True, timeout=30)


def quantum_with_checkpoint(directory: Path, repo: Path) -> int | None:
    """Return the process of a quantum of this test that has written a checkpoint."""
    for file in directory.glob("*.safetensors"):
        _, _, patch, _ = file.stem.rsplit("_", 3)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode().split("\0")
                log = os.readlink(process / "fd/2")
                if "run-qbb" in words and str(repo) in words and f"_{patch}.stderr" in log:
                    return int(process.name)
    return None


def test_parsl_in_slurm(four_patches: Path, tmp_path: Path, slurm: str) -> None:
    """All quanta of four patches in two bands, of which one is killed, goes on, and ends the same."""
    repo = Path(shutil.copytree(four_patches, tmp_path / "repo"))
    checkpoints = tmp_path / "checkpoints"
    site = {
        "class": "bps_sites.LoopbackSlurm",
        "cores_per_node": 2,
        "mem_per_node": 2,
        "walltime": "00:20:00",
    }
    command = submission(
        repo, tmp_path, "parsl_slurm.yaml", site, "checkpoint_every=2", "checkpoint_dir=$CHECKPOINTS"
    )
    variables = environment(tmp_path, SLURM_CONF=slurm, CHECKPOINTS=str(checkpoints))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log)
        try:
            end = time.monotonic() + _PATIENCE
            while (quantum := quantum_with_checkpoint(checkpoints, repo)) is None:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
            os.kill(quantum, signal.SIGKILL)
            assert process.wait(timeout=_PATIENCE) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    jobs = subprocess.run(
        ["scontrol", "show", "jobs"], env=variables, capture_output=True, text=True, check=True
    )
    assert "JobId=1" in jobs.stdout
    assert_same(repo, "u/test/slurm", set())
    logs = "".join(path.read_text() for path in tmp_path.glob("submit/**/*.stderr"))
    (kept,) = re.findall(r"The fit goes on after step (\d+)", logs)
    assert 0 < int(kept) < STEPS
    assert f"The fit has {STEPS} steps, {STEPS - int(kept)} of them taken in this process" in logs
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_templates_expand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plugin is asked for, all tasks ask for memory, time and cores as numbers.

    The plugins for HTCondor and PanDA need services that are not here; they only read what is checked here.
    """
    plain = Config(f"{TEMPLATES}/{path.name}")
    plain["wmsServiceClass"] = "lsst.ctrl.bps.parsl.ParslService"
    config = BpsConfig(plain, search_order=BPS_SEARCH_ORDER, defaults=BPS_DEFAULTS)
    if path.name in ("requests.yaml", "one_job_per_patch.yaml"):
        return
    assert config["finalJob"]["requestCpus"] == 1
    requests = yaml.safe_load((FOLDER / "requests.yaml").read_text())["pipetask"]
    for label in ("deepPriorCoadd", "measureDeepPriorCoadd", "plotDeepPriorCoadd"):
        for name, value in {"requestCpus": 1, **requests[label]}.items():
            assert config.search(name, opt={"curvals": {"curr_pipetask": label}}) == (True, value)
    if "site" in plain:
        assert config["computeSite"] in plain["site"]
    if path.name == "htcondor.yaml":
        site = config.search("computeSite", opt={"curvals": {"curr_pipetask": "deepPriorCoadd"}})[1]
        assert config[f".site.{site}.profile.condor.request_gpus"] == 1
    if path.name == "parsl_slurm_gpu.yaml":
        assert "--gres=gpu:1" in config[".site.slurm_gpu.scheduler_options"]
    if path.name in ("htcondor.yaml", "panda.yaml"):
        assert path.read_text().startswith("# NOT RUN HERE")


def test_requests_are_those_of_the_command() -> None:
    """The file of the package is what the command in its first line prints."""
    text = (FOLDER / "requests.yaml").read_text()
    command = text.splitlines()[0].removeprefix("# deepprior ").split()
    result = CliRunner().invoke(main, command)
    assert result.output == text
