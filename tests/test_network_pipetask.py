# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""A network of a Butler as a prerequisite of the pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_pipetask import PIPELINE, QUICK, pipetask

from lsst.coadd.deepprior.conditions import AXES
from lsst.coadd.deepprior.network import Trunk
from lsst.coadd.deepprior.network_dataset import ingest_network
from lsst.coadd.deepprior.weights import TrainedNetwork
from lsst.daf.butler import Butler


@pytest.fixture(scope="module")
def own_repo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, which the test of this module writes to."""
    path = tmp_path_factory.mktemp("network_pipetask") / "repo"
    shutil.copytree(repo, path)
    return path


def test_network_is_found_in_the_input_collections(own_repo: Path) -> None:
    network = TrainedNetwork(Trunk(widths=(4,)), dict.fromkeys(AXES, (-1e3, 1e3)), {"name": "toy"})
    data = ["-d", "skymap='deepprior_sim' AND band='r' AND patch=0", "-b", own_repo, "-o", "u/test/net"]
    task = ["-p", f"{PIPELINE}#restoration", "-c", "deepPriorCoadd:network_from_butler=True", *QUICK]
    ingest_network(own_repo, network, run="networks/one")

    absent = pipetask("qgraph", *data, *task, "-i", "deepprior/warps")
    assert absent.returncode == 1, absent.stdout
    assert "deep_prior_network" in absent.stdout

    inputs = ["-i", "deepprior/warps,networks/one", "--register-dataset-types"]
    result = pipetask("run", *data, *task, *inputs, "-c", "deepPriorCoadd:init=pretrained")
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(own_repo, collections="u/test/net")
    data_id = {"skymap": "deepprior_sim", "tract": 9, "patch": 0, "band": "r"}
    metrics = butler.get("deep_prior_coadd_metrics", data_id)
    assert metrics["method"] == "pretrained network"
    assert metrics["network"]["network_sha256"] == network.sha256
    assert butler.get("deep_prior_coadd", data_id).metadata["network_sha256"] == network.sha256
