# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Which network the restoration task takes, and what it says of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import yaml
from quick import quick_task

import lsst.pipe.base.testUtils
from lsst.coadd.deepprior import weights
from lsst.coadd.deepprior.network import Trunk
from lsst.coadd.deepprior.network_dataset import network_to_dataset
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from lsst.coadd.deepprior.warps import Warp
from lsst.coadd.deepprior.weights import TrainedNetwork
from lsst.daf.butler import Butler, DatasetType
from lsst.pipe.base import Struct


def network_for(result: Struct, exit_weight: float = 0.0, **ranges: tuple[float, float]) -> TrainedNetwork:
    """Return a network of random weights that was trained under the conditions of a patch, it says."""
    generator = torch.Generator().manual_seed(4)
    trunk = Trunk(widths=(4, 6))
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        trunk.exit.weight.fill_(exit_weight)
        trunk.exit.bias.fill_(0.0)
    conditions = result.metrics["network"]["conditions"]
    card = {"name": "toy", "deepprior_version": "1.2.3"}
    return TrainedNetwork(trunk, {axis: (value, value) for axis, value in conditions.items()} | ranges, card)


def test_config_refuses_a_network_that_is_not_used() -> None:
    config = DeepPriorCoaddConfig(network_from_butler=True)
    config.validate()
    config.init = "scratch"
    with pytest.raises(ValueError, match="network_from_butler needs init = 'pretrained'"):
        config.validate()


def test_network_is_an_input_only_where_it_is_asked_for() -> None:
    without = DeepPriorCoaddConnections(config=DeepPriorCoaddConfig())
    assert without.prerequisiteInputs == set()
    connections = DeepPriorCoaddConnections(config=DeepPriorCoaddConfig(network_from_butler=True))
    assert connections.prerequisiteInputs == {"network"}
    assert connections.network.name == "deep_prior_network"
    assert len(connections.network.dimensions) == 0


def test_pretrained_start(
    warps: list[Warp],
    restored: Struct,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network is used as it is: one that corrects nothing returns the base, others do not.

    The steps that the data take after any network are left out.
    """
    monkeypatch.setattr("lsst.coadd.deepprior.fitted_patch.data_steps", lambda data, sets, latent, *_: latent)
    base = quick_task(steps=0).run(warps=warps)
    network = network_for(restored)
    with caplog.at_level(logging.INFO):
        result = quick_task(init="pretrained").run(warps=warps, network=network)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ", fit: " not in caplog.text
    np.testing.assert_array_equal(result.coadd.image.array, base.coadd.image.array)
    correction = network_for(restored, exit_weight=0.05)
    other = quick_task(init="pretrained").run(warps=warps, network=correction)
    assert not np.array_equal(other.coadd.image.array, base.coadd.image.array)
    for coadd in (other.coadd, other.residual):
        assert coadd.metadata["init"] == "pretrained"
        assert coadd.metadata["network_name"] == "toy"
        assert coadd.metadata["network_version"] == "1.2.3"
        assert coadd.metadata["network_sha256"] == correction.sha256
    assert correction.sha256 != network.sha256
    metrics = other.metrics["network"]
    assert yaml.safe_load(yaml.safe_dump(metrics)) == metrics
    assert (metrics["init"], metrics["network_sha256"]) == ("pretrained", correction.sha256)


def test_patch_outside_of_the_training(
    warps: list[Warp], restored: Struct, caplog: pytest.LogCaptureFixture
) -> None:
    """It is restored from scratch, with a warning that says why."""
    network = network_for(restored, exit_weight=0.05, n_visits=(10.0, 20.0))
    with caplog.at_level(logging.WARNING):
        result = quick_task(init="pretrained").run(warps=warps, network=network)
    where = f"tract 9, patch {warps[0].patch.id}, r band"
    reason = "outside of what the network toy was trained on: n_visits = 4, trained from 10 to 20."
    assert f"{where}: {reason}" in caplog.text
    assert f"{where}: restored without the network toy; network fitted from scratch." in caplog.text
    np.testing.assert_array_equal(result.coadd.image.array, restored.coadd.image.array)
    assert result.coadd.metadata["init"] == "scratch"
    assert "network_sha256" not in result.coadd.metadata
    assert result.metrics["network"]["init"] == "scratch"
    assert result.metrics["network"]["outside"] == ["n_visits = 4, trained from 10 to 20"]


def test_patch_outside_of_the_training_without_a_fit(
    warps: list[Warp],
    restored: Struct,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = network_for(restored, exit_weight=0.05, n_visits=(10.0, 20.0))
    method = "maximum likelihood: no steps asked for"
    with caplog.at_level(logging.WARNING):
        result = quick_task(init="pretrained", steps=0).run(warps=warps, network=network)
    assert f"r band: restored without the network toy; {method}." in caplog.text
    assert "scratch" not in caplog.text
    assert result.coadd.metadata["method"] == result.metrics["method"] == method
    assert result.coadd.metadata["init"] == result.metrics["network"]["init"] == "none"
    assert "network_name" not in result.residual.metadata


def test_network_of_the_package_is_the_default(
    warps: list[Warp], restored: Struct, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DeepPriorCoaddConfig().init == "pretrained"
    network = network_for(restored)
    monkeypatch.setattr(weights, "packaged_network", lambda: network)
    result = quick_task(init="pretrained").run(warps=warps)
    assert result.coadd.metadata["network_sha256"] == network.sha256
    assert restored.coadd.metadata["init"] == "scratch"


def test_missing_network_of_the_package(warps: list[Warp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PACKAGED", "networks/none.safetensors")
    with pytest.raises(RuntimeError, match="install the package anew. .* init = 'scratch' needs no network"):
        quick_task(init="pretrained").run(warps=warps)
    assert quick_task(steps=0).run(warps=warps).coadd.metadata["init"] == "none"


def test_network_of_the_butler(butler: Butler, restored: Struct) -> None:
    """The task reads the dataset, and refuses a damaged one by name."""
    patch_id = {"skymap": "deepprior_sim", "tract": 9, "patch": 1, "band": "r"}
    refs = butler.query_datasets("deep_prior_warp", where="patch = 1 and band = 'r'")
    inputs = {"warps": [dict(ref.dataId.required) for ref in refs], "network": {}}
    outputs = dict.fromkeys(("coadd", "residual", "outliers", "metrics"), patch_id)
    network = network_for(restored)
    butler.registry.registerDatasetType(
        DatasetType("deep_prior_network", (), "ArrowNumpyDict", universe=butler.dimensions)
    )
    butler.put(network_to_dataset(network), "deep_prior_network")
    task = quick_task(init="pretrained", network_from_butler=True)
    quantum = lsst.pipe.base.testUtils.makeQuantum(task, butler, patch_id, inputs | outputs)
    run = lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=True)
    assert run.call_args.kwargs["network"].sha256 == network.sha256

    (ref,) = butler.query_datasets("deep_prior_network")
    damaged = network_to_dataset(network)
    damaged["safetensors"] = damaged["safetensors"][:-9]
    butler.pruneDatasets([ref], disassociate=True, unstore=True, purge=True)
    butler.put(damaged, "deep_prior_network")
    quantum = lsst.pipe.base.testUtils.makeQuantum(task, butler, patch_id, inputs | outputs)
    with pytest.raises(RuntimeError, match="The network deep_prior_network.* cannot be used: .*damaged"):
        lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=True)
