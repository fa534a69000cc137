# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The pipeline as users run it, on a repository of two patches and two bands."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from run_pipetask import PIPELINE, QUICK, pipetask

from lsst.daf.butler import Butler

DATASETS = {
    "deepPriorCoadd": (
        "deep_prior_coadd",
        "deep_prior_residual",
        "deep_prior_coadd_outliers",
        "deep_prior_coadd_metrics",
    ),
    "measureDeepPriorCoadd": ("deep_prior_coadd_sources",),
    "plotDeepPriorCoadd": ("deep_prior_coadd_plot",),
}


@pytest.fixture(scope="module")
def own_repo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, with one more patch that has no warps; the tests of this module write to it."""
    path = tmp_path_factory.mktemp("pipetask") / "repo"
    shutil.copytree(repo, path)
    butler = Butler.from_config(path, writeable=True)
    (like,) = butler.query_dimension_records("patch", where="skymap = 'deepprior_sim' AND patch = 1")
    butler.registry.insertDimensionData("patch", like.toDict() | {"id": 2, "cell_x": 2})
    return path


def found(repo: Path, collection: str, dataset_type: str) -> set[tuple[int, str]]:
    """Return the patches and bands for which a collection has a dataset."""
    refs = Butler.from_config(repo).query_datasets(dataset_type, collections=collection, explain=False)
    return {(int(ref.dataId["patch"]), str(ref.dataId["band"])) for ref in refs}


def test_build() -> None:
    result = pipetask("build", "-p", PIPELINE, "--show", "pipeline", "--show", "config=deepPriorCoadd::steps")
    assert result.returncode == 0, result.stdout
    for label in DATASETS:
        assert f"{label}:" in result.stdout
    assert "config.steps=400" in result.stdout


def test_graph(own_repo: Path) -> None:
    """Each patch and band with warps gets its three quanta; the patch without warps gets none."""
    result = pipetask("qgraph", "-b", own_repo, "-i", "deepprior/warps", "-o", "u/test/graph", "-p", PIPELINE)
    assert result.returncode == 0, result.stdout
    assert "12 quanta for 3 tasks" in result.stdout
    only = ["qgraph", "-b", own_repo, "-i", "deepprior/warps", "-o", "u/test/graph", "-p", PIPELINE, "-d"]
    result = pipetask(*only, "skymap='deepprior_sim' AND band='r' AND patch=0")
    assert result.returncode == 0, result.stdout
    assert "3 quanta for 3 tasks" in result.stdout
    result = pipetask(*only, "skymap='deepprior_sim' AND tract=9 AND patch=2")
    assert result.returncode == 1, result.stdout
    assert "QuantumGraph contains no quanta" in result.stdout


def test_runs_build_on_each_other(own_repo: Path) -> None:
    """Restore one band, then extend that run, then make a run that skips what exists."""
    run = ["run", "-b", own_repo, "-i", "deepprior/warps", "--register-dataset-types", *QUICK]
    red = ["-d", "skymap='deepprior_sim' AND band='r'"]
    red_ids = {(0, "r"), (1, "r")}

    result = pipetask(*run, *red, "-o", "u/test/chain", "-p", f"{PIPELINE}#restoration")
    assert result.returncode == 0, result.stdout
    for dataset_type in DATASETS["deepPriorCoadd"]:
        assert found(own_repo, "u/test/chain", dataset_type) == red_ids
    first_run = Butler.from_config(own_repo).collections.get_info("u/test/chain").children[0]

    # The configuration of the task that has run must be the same in an extended run, the others may follow.
    result = pipetask(*run, *red, "-o", "u/test/chain", "-p", PIPELINE, "--extend-run")
    assert result.returncode == 0, result.stdout
    assert "Executed 4 quanta successfully, 0 failed" in result.stdout
    for dataset_types in DATASETS.values():
        for dataset_type in dataset_types:
            assert found(own_repo, first_run, dataset_type) == red_ids

    result = pipetask(
        *run,
        *("-o", "u/test/both", "-p", PIPELINE, "--skip-existing-in", "u/test/chain", "-j", "2"),
        *("-c", "measureDeepPriorCoadd:min_snr=6.0", "-c", "measureDeepPriorCoadd:write_measure_coadd=True"),
    )
    assert result.returncode == 0, result.stdout
    assert "Executed 6 quanta successfully, 0 failed" in result.stdout
    new_run = Butler.from_config(own_repo).collections.get_info("u/test/both").children[0]
    for dataset_types in DATASETS.values():
        for dataset_type in dataset_types:
            assert found(own_repo, new_run, dataset_type) == {(0, "i"), (1, "i")}

    assert found(own_repo, new_run, "deep_prior_measure_coadd") == {(0, "i"), (1, "i")}
    butler = Butler.from_config(own_repo, collections="u/test/both")
    data_id = {"skymap": "deepprior_sim", "tract": 9, "patch": 0, "band": "i"}
    both, coadd, residual = (
        butler.get(name, data_id)
        for name in ("deep_prior_measure_coadd", "deep_prior_coadd", "deep_prior_residual")
    )
    seen = np.isfinite(residual.image.array)
    np.testing.assert_allclose(
        both.image.array[seen], (coadd.image.array + residual.image.array)[seen], rtol=1e-5, atol=1e-3
    )
    outliers = butler.get("deep_prior_coadd_outliers", data_id)
    assert {"instrument", "visit", "ra", "dec", "psf_flux", "psf_flux_err"} <= set(outliers.colnames)

    again = pipetask(*run, *red, "-o", "u/test/chain", "-p", PIPELINE, "--extend-run")
    assert again.returncode == 1, again.stdout
    assert "QuantumGraph contains no quanta" in again.stdout
