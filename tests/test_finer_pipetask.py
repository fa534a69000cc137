# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Finer pixels as users run them: a skymap of their own, the pipeline, and what it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from run_pipetask import PIPELINE, QUICK, pipetask

from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.tasks.finer_inputs import find_in_normal_skymap
from lsst.daf.butler import Butler, DataCoordinate, DatasetType

FINER = "$COADD_DEEPPRIOR_DIR/pipelines/finerDeepPriorCoadd.yaml"
INPUTS = "deepprior/warps,deepprior/finer_skymaps"


def register(repo: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["finer-skymap", str(repo), *options])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def own_repo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with a skymap of pixels of half the size."""
    path = tmp_path_factory.mktemp("finer_pipetask") / "repo"
    shutil.copytree(repo, path)
    code, output = register(path, "--skymap", "deepprior_sim")
    assert code == 0, output
    assert "The skymap deepprior_sim_x2" in output
    assert "has 2 patches" in output
    return path


def test_skymap_is_registered_once(own_repo: Path) -> None:
    assert register(own_repo, "--skymap", "deepprior_sim")[0] == 0
    with Butler.from_config(own_repo) as butler:
        normal, finer = (
            butler.query_dimension_records("patch", data_id={"skymap": name})
            for name in ("deepprior_sim", "deepprior_sim_x2")
        )
        assert len(normal) == len(finer) == 2
        for one, other in zip(normal, finer, strict=True):
            assert (one.id, one.cell_x, one.cell_y) == (other.id, other.cell_x, other.cell_y)
            assert one.region == other.region
        hashes = {record.hash for record in butler.query_dimension_records("skymap")}
        assert len(hashes) == 2
        stored = butler.get(
            "deep_prior_finer_skymap", skymap="deepprior_sim_x2", collections="deepprior/finer_skymaps"
        )
        assert stored == {"skymap": "deepprior_sim", "oversampling": 2}


def test_a_sky_map_that_was_registered_before_stays(repo: Path, tmp_path: Path) -> None:
    """With a hash and regions of its own, as lsst.skymap registers it: what is missing is added to it."""
    path = tmp_path / "repo"
    shutil.copytree(repo, path)
    name = "deepprior_sim_x2"
    own = {"name": name, "hash": b"of its definition".ljust(20), "tract_max": 12, "patch_nx_max": 3}
    with Butler.from_config(path, writeable=True) as butler:
        (tract,) = butler.query_dimension_records("tract", data_id={"skymap": "deepprior_sim"})
        patch, other = butler.query_dimension_records("patch", data_id={"skymap": "deepprior_sim"})
        registry = butler.registry
        registry.syncDimensionData("skymap", own)
        registry.syncDimensionData("tract", tract.toDict() | {"skymap": name, "region": patch.region})
        registry.syncDimensionData("patch", patch.toDict() | {"skymap": name, "cell_x": 7})
    code, output = register(path, "--skymap", "deepprior_sim")
    assert code == 0, output
    assert "has 2 patches" in output
    with Butler.from_config(path, writeable=True) as butler:
        (skymap,) = butler.query_dimension_records("skymap", data_id={"skymap": name})
        assert own.items() <= skymap.toDict().items()
        (tract,) = butler.query_dimension_records("tract", data_id={"skymap": name})
        assert tract.region == patch.region
        patches = butler.query_dimension_records("patch", data_id={"skymap": name})
        assert {record.id: record.cell_x for record in patches} == {patch.id: 7, other.id: other.cell_x}
        assert not butler.registry.syncDimensionData("skymap", own)
        assert butler.find_dataset(
            "deep_prior_finer_skymap", skymap=name, collections="deepprior/finer_skymaps"
        )


def test_wrong_skymaps_are_refused(own_repo: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--skymap", "deepprior_sim_x2"), "has finer pixels already"),
        (("--skymap", "another"), "has no patch of a skymap another"),
        (("--oversampling", "4"), "'4' is not one of"),
    ):
        code, output = register(own_repo, *options)
        assert code != 0
        assert message in output
    assert register(tmp_path / "nothing")[0] != 0


def test_graph_without_a_finer_skymap(repo: Path) -> None:
    """The message is that of the graph builder; the page on finer pixels names its cause."""
    result = pipetask("qgraph", "-b", repo, "-o", "u/test/graph", "-i", "deepprior/warps", "-p", FINER)
    assert result.returncode == 1, result.stdout
    page = (Path(__file__).parents[1] / "doc/lsst.coadd.deepprior/finer-pixels.rst").read_text()
    for words in (
        "No datasets for overall-input 'deep_prior_finer_skymap' found",
        "probably a bug in either the pipeline definition",
    ):
        assert words in result.stdout
        assert words in page


def test_graphs(own_repo: Path) -> None:
    """The finer pipeline takes the patches of its own skymap, and the normal one those of the warps."""
    graph = ["qgraph", "-b", own_repo, "-o", "u/test/graph"]
    result = pipetask(*graph, "-i", INPUTS, "-p", FINER)
    assert result.returncode == 0, result.stdout
    assert "12 quanta for 3 tasks" in result.stdout
    result = pipetask(*graph, "-i", INPUTS, "-p", FINER, "-c", "parameters:oversampling=3")
    assert result.returncode == 1, result.stdout
    assert "QuantumGraph contains no quanta" in result.stdout
    reason = "The pixels of the skymap deepprior_sim_x2 are not 3 times finer"
    assert result.stdout.count(reason) == 1
    assert "deepprior finer-skymap --oversampling 3 registers" in result.stdout
    for inputs in ("deepprior/warps", INPUTS):
        result = pipetask(*graph, "-i", inputs, "-p", PIPELINE)
        assert result.returncode == 0, result.stdout
        assert "12 quanta for 3 tasks" in result.stdout


def test_lookup(own_repo: Path) -> None:
    with Butler.from_config(own_repo, writeable=True) as butler:
        data_id = DataCoordinate.standardize(
            skymap="deepprior_sim_x2", tract=9, patch=1, band="i", universe=butler.dimensions
        )
        warps = butler.get_dataset_type("deep_prior_warp")
        refs = find_in_normal_skymap(warps, butler.registry, data_id, ["deepprior/warps"], oversampling=2)
        assert [ref.dataId["visit"] for ref in refs] == [4000, 4001, 4002]
        assert {(ref.dataId["skymap"], ref.dataId["patch"]) for ref in refs} == {("deepprior_sim", 1)}
        assert not find_in_normal_skymap(warps, butler.registry, data_id, ["deepprior/warps"], oversampling=3)
        unknown = DatasetType("unknown", ("skymap",), "StructuredDataDict", universe=butler.dimensions)
        assert not find_in_normal_skymap(
            unknown, butler.registry, data_id, ["deepprior/warps"], oversampling=2
        )
        of_skymap = DatasetType("skyMap", ("skymap",), "StructuredDataDict", universe=butler.dimensions)
        butler.registry.registerDatasetType(of_skymap)
        butler.collections.register("skymaps")
        butler.put({}, of_skymap, skymap="deepprior_sim", run="skymaps")
        (ref,) = find_in_normal_skymap(of_skymap, butler.registry, data_id, ["skymaps"], oversampling=2)
        assert ref.dataId["skymap"] == "deepprior_sim"


def test_run(own_repo: Path) -> None:
    """From warps to sources and figure, by a saved graph, beside the normal coadds of the same patch."""
    data = ["-b", own_repo, "-d", "skymap='deepprior_sim_x2' AND tract=9 AND patch=1 AND band='r'"]
    graph = own_repo.parent / "finer.qg"
    settings = [*QUICK, "-c", "deepPriorCoadd:init=scratch"]
    result = pipetask(
        *("qgraph", *data, "-i", INPUTS, "-o", "u/test/finer", "-p", FINER, "--save-qgraph", graph), *settings
    )
    assert result.returncode == 0, result.stdout
    result = pipetask(
        *("run", "-b", own_repo, "-i", INPUTS, "-o", "u/test/finer", "-g", graph),
        "--register-dataset-types",
    )
    assert result.returncode == 0, result.stdout
    assert "Executed 3 quanta successfully, 0 failed" in result.stdout
    normal = pipetask(
        *("run", "-b", own_repo, "-i", "u/test/finer", "-o", "u/test/normal", "-p", PIPELINE),
        *("-d", "skymap='deepprior_sim' AND tract=9 AND patch=1 AND band='r'", *settings),
        "--register-dataset-types",
    )
    assert normal.returncode == 0, normal.stdout

    butler = Butler.from_config(own_repo, collections="u/test/normal")
    data_id = {"tract": 9, "patch": 1, "band": "r"}
    coadd, fine = (
        butler.get("deep_prior_coadd", data_id, skymap=name) for name in ("deepprior_sim", "deepprior_sim_x2")
    )
    assert fine.image.array.shape == tuple(2 * n for n in coadd.image.array.shape)
    assert fine.metadata["init"] == "scratch"
    corner, same = (
        one.sky_projection.pixel_to_sky(x=one.bbox.x.start - 0.5, y=one.bbox.y.start - 0.5)
        for one in (coadd, fine)
    )
    assert corner.separation(same).arcsec < 1e-6
    assert butler.get("deep_prior_coadd_metrics", data_id, skymap="deepprior_sim_x2")["oversampling"] == 2
    residual = butler.get("deep_prior_residual", data_id, skymap="deepprior_sim_x2")
    assert np.isfinite(residual.image.array).mean() > 0.9
    assert len(butler.get("deep_prior_coadd_sources", data_id, skymap="deepprior_sim_x2").colnames) > 20
    assert Path(butler.getURI("deep_prior_coadd_plot", data_id, skymap="deepprior_sim_x2").ospath).is_file()
