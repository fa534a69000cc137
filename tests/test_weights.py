# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Networks as files, as the package's own file, and as datasets of a Butler."""

from __future__ import annotations

import importlib.resources
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lsst.coadd.deepprior.network import FEATURES, Trunk
from lsst.coadd.deepprior.network_dataset import (
    DEFAULT_NETWORK_RUN,
    NETWORK_DATASET_TYPE,
    NetworkIngestError,
    ingest_network,
    network_from_dataset,
    network_to_dataset,
)
from lsst.coadd.deepprior.weights import InvalidNetworkError, TrainedNetwork, packaged_network
from lsst.daf.butler import Butler, CollectionType

RANGES = {"n_visits": (2.0, 200.0), "seeing_pixels": (2.5, 7.5), "noise_correlation": (-0.01, 0.4)}
CARD = {"name": "toy", "deepprior_version": "1.2.3", "command": "none; it is random — a «test»"}


def make_network(seed: int = 1, widths: tuple[int, ...] = (8, 12)) -> TrainedNetwork:
    generator = torch.Generator().manual_seed(seed)
    trunk = Trunk(widths=widths)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return TrainedNetwork(trunk, dict(RANGES), dict(CARD))


def header_of(data: bytes) -> dict[str, object]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewritten(
    data: bytes,
    *,
    header: Callable[[dict], object] = lambda header: None,
    tensors: Callable[[dict], object] = lambda tensors: None,
) -> bytes:
    """Change the header or the tensors of a file and leave everything else as it is, the checksum too."""
    content = safetensors.torch.load(data)
    facts = json.loads(header_of(data)["__metadata__"]["deepprior"])
    header(facts)
    tensors(content)
    return safetensors.torch.save(content, {"deepprior": json.dumps(facts)})


@pytest.fixture(scope="module")
def data() -> bytes:
    return make_network().to_bytes()


@pytest.mark.parametrize("widths", [(8, 12), (6,), (4, 6, 8, 10)])
def test_round_trip(widths: tuple[int, ...]) -> None:
    network = make_network(widths=widths)
    data = network.to_bytes()
    back = TrainedNetwork.from_bytes(data)
    assert back.ranges == RANGES
    assert back.card == CARD
    assert (back.name, back.version) == ("toy", "1.2.3")
    assert back.sha256 == network.sha256
    assert back.to_bytes() == data
    assert not any(parameter.requires_grad for parameter in back.trunk.parameters())
    channels = torch.randn((1, len(FEATURES), 19, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network.trunk(channels)
        assert expected.abs().max() > 0.0
        torch.testing.assert_close(back.trunk(channels), expected, rtol=0.0, atol=0.0)


def test_reading_leaves_random_numbers_alone(data: bytes) -> None:
    before = torch.random.get_rng_state()
    TrainedNetwork.from_bytes(data)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_use_in_double_precision_does_not_change_the_file(data: bytes) -> None:
    network = TrainedNetwork.from_bytes(data)
    network.trunk.to(torch.float64)
    assert network.to_bytes() == data


def test_checksum_tells_networks_apart() -> None:
    network = make_network()
    others = [
        make_network(seed=2),
        TrainedNetwork(network.trunk, RANGES | {"n_visits": (2.0, 199.0)}, CARD),
        TrainedNetwork(network.trunk, RANGES, CARD | {"name": "another"}),
    ]
    assert len({other.sha256 for other in [network, *others]}) == 4


def test_outside() -> None:
    network = make_network()
    inside = {"n_visits": 2.0, "seeing_pixels": 5.0, "noise_correlation": 0.4}
    assert network.outside(inside) == []
    assert network.outside(inside | {"n_visits": 203.0, "noise_correlation": -0.02}) == []
    assert len(network.outside(inside | {"n_visits": 205.0, "seeing_pixels": 2.4})) == 2
    assert network.outside(inside | {"n_visits": 1.0}) == ["n_visits = 1, trained from 2 to 200"]
    assert network.outside(inside | {"noise_correlation": -0.04, "seeing_pixels": 8.0}) == [
        "seeing_pixels = 8, trained from 2.5 to 7.5",
        "noise_correlation = -0.04, trained from -0.01 to 0.4",
    ]
    (message,) = network.outside(inside | {"seeing_pixels": math.nan})
    assert message.startswith("seeing_pixels = nan")
    (message,) = network.outside(inside | {"airmass": 1.5})
    assert message == "airmass = 1.5, for which no trained range is known"
    assert network.outside({"n_visits": 12.0, "seeing_pixels": 5.0}) == ["noise_correlation is not known"]


@pytest.mark.parametrize(
    ("ranges", "card", "message"),
    [
        ({"n_visits": (3.0, 2.0)}, {}, "n_visits"),
        ({"n_visits": (0.0, math.inf)}, {}, "n_visits"),
        ({"n_visits": (0.0,)}, {}, "n_visits"),
        ({}, {"steps": 5}, "card"),
    ],
)
def test_impossible_networks_are_refused(ranges: dict, card: dict, message: str) -> None:
    with pytest.raises(InvalidNetworkError, match=message):
        TrainedNetwork(Trunk(widths=(4,)), ranges, card)


def test_network_of_other_features_is_refused() -> None:
    with pytest.raises(InvalidNetworkError, match=f"reads {len(FEATURES) + 1} features"):
        TrainedNetwork(Trunk(widths=(4,), in_channels=len(FEATURES) + 1), {}, {})


def test_diverged_network_is_not_written() -> None:
    network = make_network()
    with torch.no_grad():
        network.trunk.exit.weight[0, 0, 0, 0] = math.inf
    with pytest.raises(InvalidNetworkError, match="exit.weight is not finite"):
        network.to_bytes()


def test_truncated_data_are_refused(data: bytes) -> None:
    length = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 4, 8, 100, length, length + 4, len(data) - 1):
        with pytest.raises(InvalidNetworkError, match="damaged"):
            TrainedNetwork.from_bytes(data[:size])
    with pytest.raises(InvalidNetworkError, match="damaged"):
        TrainedNetwork.from_bytes(data + b"\0")


def test_any_changed_byte_is_noticed(data: bytes) -> None:
    rng = np.random.default_rng(3)
    length = 8 + int.from_bytes(data[:8], "little")
    text = data[:length].rstrip()
    places = [*rng.integers(0, len(text), 60), *rng.integers(length, len(data), 60)]
    for place in places:
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(InvalidNetworkError):
            TrainedNetwork.from_bytes(bytes(spoiled))


def test_foreign_data_are_refused() -> None:
    foreign = {
        b"SIMPLE  =                    T" + b" " * 2850: "damaged",
        b"PK\x03\x04" + b"\0" * 200: "damaged",
        safetensors.torch.save({"weight": torch.ones(3)}): "another software",
        safetensors.torch.save({"weight": torch.ones(3)}, {"format": "pt"}): "another software",
        safetensors.torch.save(
            {"weight": torch.ones(3)}, {"deepprior": '{"format": "x"}'}
        ): "another software",
        safetensors.torch.save({"weight": torch.ones(3)}, {"deepprior": "[]"}): "another software",
        safetensors.torch.save({"weight": torch.ones(3)}, {"deepprior": "{"}): "header",
    }
    for content, message in foreign.items():
        with pytest.raises(InvalidNetworkError, match=message):
            TrainedNetwork.from_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "version 2 of the format"),
        (lambda h: h.update(version=None), "version None of the format"),
        (lambda h: h.update(features=[*FEATURES, "depth"]), "features.*depth.*train it anew"),
        (lambda h: h.update(features=list(FEATURES)[::-1]), "made for the features"),
        (lambda h: h.update(widths=[8, 16]), "has the shape"),
        (lambda h: h.update(widths=[8]), "lacks weights or has too many"),
        (lambda h: h.update(widths=[8, 12, 16]), "lacks weights or has too many"),
        (lambda h: h.update(widths=[]), "header"),
        (lambda h: h.update(widths="8"), "header"),
        (lambda h: h.update(widths=[8, -12]), "header"),
        (lambda h: h.pop("ranges"), "header"),
        (lambda h: h.update(ranges=[1, 2]), "header"),
        (lambda h: h.update(ranges={"n_visits": "many"}), "header"),
        (lambda h: h.update(card=None), "header"),
        (lambda h: h["ranges"].update(n_visits=[1.0, 1e6]), "checksum"),
        (lambda h: h.pop("sha256"), "checksum"),
    ],
)
def test_wrong_headers_are_refused(data: bytes, change: Callable[[dict], object], message: str) -> None:
    with pytest.raises(InvalidNetworkError, match=message):
        TrainedNetwork.from_bytes(rewritten(data, header=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("exit.bias"), "lacks weights or has too many of them: exit.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "lacks weights or has too many of them: extra"),
        (lambda t: t.update({"exit.bias": torch.ones(5)}), r"exit.bias has the shape \(5,\), not \(4,\)"),
        (lambda t: t.update({"exit.bias": t["exit.bias"].half()}), "exit.bias is of type torch.float16"),
        (lambda t: t["exit.bias"].fill_(math.nan), "exit.bias is not finite"),
        (lambda t: t["exit.bias"].add_(1e-6), "checksum"),
    ],
)
def test_wrong_weights_are_refused(data: bytes, change: Callable[[dict], object], message: str) -> None:
    with pytest.raises(InvalidNetworkError, match=message):
        TrainedNetwork.from_bytes(rewritten(data, tensors=change))


def test_packaged_network() -> None:
    file = importlib.resources.files("lsst.coadd.deepprior.resources") / "networks/default.safetensors"
    assert len(file.read_bytes()) <= 2_000_000
    network = packaged_network()
    assert set(network.ranges) == {
        "n_visits",
        "seeing_pixels",
        "target_pixels",
        "lit_fraction",
        "noise_correlation",
        "base_steps",
    }
    assert network.ranges["base_steps"] == (240.0, 240.0)
    assert network.card["command"].startswith("deepprior train ")
    assert bool((network.trunk.exit.weight != 0.0).any())


def test_missing_packaged_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsst.coadd.deepprior.weights._PACKAGED", "networks/none.safetensors")
    with pytest.raises(InvalidNetworkError, match="none.safetensors.*install the package anew"):
        packaged_network()


@pytest.fixture(scope="module")
def own_repo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that the tests of this module write to."""
    path = tmp_path_factory.mktemp("weights") / "repo"
    shutil.copytree(repo, path)
    return path


def test_butler_round_trip(own_repo: Path) -> None:
    network = make_network()
    assert ingest_network(own_repo, network)
    assert not ingest_network(own_repo, network)
    assert ingest_network(own_repo, make_network(seed=2), run="deepprior/another")
    butler = Butler.from_config(own_repo)
    back = network_from_dataset(butler.get(NETWORK_DATASET_TYPE, collections=DEFAULT_NETWORK_RUN))
    assert back.to_bytes() == network.to_bytes()
    both = ["deepprior/another", DEFAULT_NETWORK_RUN]
    assert network_from_dataset(butler.get(NETWORK_DATASET_TYPE, collections=both)).sha256 != network.sha256
    assert butler.getURI(NETWORK_DATASET_TYPE, collections=both).getExtension() == ".parq"


def test_a_collection_holds_one_network(own_repo: Path) -> None:
    ingest_network(own_repo, make_network(), run="one")
    with pytest.raises(NetworkIngestError, match="one of .* holds another network"):
        ingest_network(own_repo, make_network(seed=2), run="one")
    butler = Butler.from_config(own_repo)
    assert network_from_dataset(butler.get(NETWORK_DATASET_TYPE, collections="one")).sha256 == (
        make_network().sha256
    )


def test_a_network_is_not_put_where_no_pipeline_could_find_it(own_repo: Path) -> None:
    for run in ("", "one,two", "u/*"):
        with pytest.raises(NetworkIngestError, match="is no name of a collection"):
            ingest_network(own_repo, make_network(), run=run)


def test_repositories_that_cannot_take_a_network(own_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(NetworkIngestError, match="nothing"):
        ingest_network(tmp_path / "nothing", make_network())
    Butler.from_config(own_repo, writeable=True).collections.register("tag", type=CollectionType.TAGGED)
    with pytest.raises(NetworkIngestError, match="tag"):
        ingest_network(own_repo, make_network(), run="tag")


def test_datasets_that_are_no_network() -> None:
    dataset = network_to_dataset(make_network())
    for wrong in ({}, {"x": dataset["safetensors"]}, {"safetensors": dataset["safetensors"].astype(float)}):
        with pytest.raises(InvalidNetworkError, match="is no network"):
            network_from_dataset(wrong)
    with pytest.raises(InvalidNetworkError, match="damaged"):
        network_from_dataset({"safetensors": dataset["safetensors"][:-5]})
