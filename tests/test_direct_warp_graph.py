# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Graphs and selection of direct warps; building a graph reads no dataset, so neither needs afw."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_pipetask import pipetask

from lsst.coadd.deepprior.direct_warps import PatchGeometry
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.finer_skymap_dataset import register_finer_skymap
from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from lsst.coadd.deepprior.tasks.direct_warp_inputs import select_visits
from lsst.coadd.deepprior.tasks.plot_deep_prior_coadd import (
    PlotDeepPriorCoaddConfig,
    PlotDeepPriorCoaddConnections,
)
from lsst.coadd.deepprior.warp_streams import WarpHandles
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler, DatasetType
from lsst.pipe.base import NoWorkFound, Pipeline
from lsst.pipe.base.all_dimensions_quantum_graph_builder import AllDimensionsQuantumGraphBuilder

PIPELINE = "$COADD_DEEPPRIOR_DIR/pipelines/DRP-deepPrior.yaml"
OF_WARP = ("skymap", "tract", "patch", "instrument", "visit")
RUN = "u/test/drp"


@pytest.fixture(scope="module")
def drp_repo(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that knows of direct warps and their companions, as a Rubin repository does.

    There are two patches and two bands, with three visits each; the last visit of each patch and band has no
    artifact mask, so that graphs that need one leave it out.
    """
    path = tmp_path_factory.mktemp("drp") / "repo"
    shutil.copytree(repo, path)
    butler = Butler.from_config(path, writeable=True)
    butler.registry.registerRun(RUN)
    warps = butler.query_datasets("deep_prior_warp", collections="deepprior/warps")
    of_warps = {ref.dataId for ref in warps}
    last = {(ref.dataId["patch"], ref.dataId["band"]): ref.dataId for ref in sorted(warps, key=visit_of)}
    (skymap,) = {str(ref.dataId["skymap"]) for ref in warps}
    selections = {(str(d["instrument"]), int(d["tract"]), int(d["patch"]), str(d["band"])) for d in of_warps}
    for name, storage_class, dimensions, data_ids in (
        ("direct_warp", "ExposureF", OF_WARP, of_warps),
        ("direct_warp_masked_fraction", "ImageF", OF_WARP, of_warps),
        ("deepCoadd_directWarp_noise0", "MaskedImageF", OF_WARP, of_warps),
        ("compare_warp_artifact_mask", "Mask", OF_WARP, of_warps - set(last.values())),
        ("skyMap", "SkyMap", ("skymap",), [{"skymap": skymap}]),
        (
            "deep_coadd_visit_selection",
            "StructuredDataDict",
            ("instrument", "skymap", "tract", "patch", "band"),
            [
                {"skymap": skymap, "instrument": i, "tract": t, "patch": p, "band": b}
                for i, t, p, b in selections
            ],
        ),
    ):
        butler.registry.registerDatasetType(
            DatasetType(name, dimensions, storage_class, universe=butler.dimensions)
        )
        butler.registry.insertDatasets(name, data_ids, run=RUN)
    return path


def visit_of(ref: Any) -> int:
    return int(ref.dataId["visit"])


def test_quantum_has_the_warps_of_its_band_and_what_goes_with_them(drp_repo: Path) -> None:
    butler = Butler.from_config(drp_repo, writeable=True)
    pipeline = Pipeline.from_uri(f"{PIPELINE}#restoration")
    pipeline.addConfigOverride("deepPriorCoadd", "max_masked_fraction", 0.5)
    pipeline.addConfigOverride("deepPriorCoadd", "n_noise_warps", 1)
    graph = pipeline.to_graph(registry=butler.registry)
    builder = AllDimensionsQuantumGraphBuilder(
        graph, butler, input_collections=[RUN], output_run="u/test/new"
    )
    quanta = list(builder.build(attach_datastore_records=False).get_task_quanta("deepPriorCoadd").values())
    assert len(quanta) == 4
    for quantum in quanta:
        inputs = {dataset_type.name: refs for dataset_type, refs in quantum.inputs.items()}
        assert {ref.dataId["patch"] for ref in inputs["direct_warp"]} == {quantum.dataId["patch"]}
        assert {ref.dataId["band"] for ref in inputs["direct_warp"]} == {quantum.dataId["band"]}
        counts = {name: len(refs) for name, refs in inputs.items()}
        assert counts == {
            "direct_warp": 2,
            "direct_warp_masked_fraction": 2,
            "deepCoadd_directWarp_noise0": 2,
            "compare_warp_artifact_mask": 2,
            "deep_coadd_visit_selection": 1,
            "skyMap": 1,
        }
        storage_classes = {t.name: t.storageClass_name for t in quantum.inputs}
        assert storage_classes["direct_warp"] == "ExposureF"
        # What a warp needs to know comes with its data ID.
        data_id = inputs["direct_warp"][0].dataId
        assert data_id["band"] == quantum.dataId["band"]
        assert data_id["day_obs"] > 20200101
        assert data_id["physical_filter"]


def test_pipetask_builds_and_saves_the_graph(drp_repo: Path, tmp_path: Path) -> None:
    result = pipetask(
        *("qgraph", "-b", drp_repo, "-i", RUN, "-o", "u/test/graph", "-p", f"{PIPELINE}#catalogue"),
        *("--save-qgraph", tmp_path / "deep.qg"),
    )
    assert result.returncode == 0, result.stdout
    assert "12 quanta for 3 tasks" in result.stdout
    assert (tmp_path / "deep.qg").stat().st_size > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("select_visits", True),
        ("use_artifact_masks", True),
        ("n_noise_warps", 1),
        ("max_masked_fraction", 0.0),
    ],
)
def test_companions_need_exposures(field: str, value: object) -> None:
    config = DeepPriorCoaddConfig()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"{field} needs warp_form = 'exposure'"):
        config.validate()
    config.warp_form = "exposure"
    config.validate()


def test_form_of_the_warps_decides_the_connections() -> None:
    plain = DeepPriorCoaddConnections(config=DeepPriorCoaddConfig())
    assert plain.inputs == {"warps"}
    config = DeepPriorCoaddConfig(warp_form="exposure")
    assert DeepPriorCoaddConnections(config=config).inputs == {"direct_warps", "sky_map"}
    plot = PlotDeepPriorCoaddConnections(config=PlotDeepPriorCoaddConfig(warp_form="exposure"))
    assert "direct_warps" in plot.inputs
    assert "warps" not in plot.inputs


def handles(*visits: int) -> list[Any]:
    return [SimpleNamespace(dataId={"instrument": "Cam", "visit": visit}) for visit in visits]


def test_visits_are_selected(caplog: pytest.LogCaptureFixture) -> None:
    """Selections are dicts with the visits as keys, which YAML may have turned into strings."""
    log = logging.getLogger("test")
    given = handles(1, 2, 3, 4)
    with caplog.at_level(logging.INFO):
        chosen = select_visits(given, selections=[("Cam", {1: True, "3": True, 9: True})], log=log)
    assert chosen == [given[0], given[2]]
    assert "Cam visit 2 is not among the selected ones and is left out." in caplog.text
    assert select_visits(given, log=log) == given
    masks = {("Cam", 3): "a mask", ("Other", 1): "another"}
    assert select_visits(given, artifact_masks=masks, log=log) == [given[2]]
    with pytest.raises(NoWorkFound, match="None of the 4 direct warps"):
        select_visits(given, selections=[("Other", {1: True})], log=log)
    with pytest.raises(NoWorkFound, match="None of the 4 direct warps"):
        select_visits(given, selections=[("Cam", {1: True})], artifact_masks=masks, log=log)


def test_warps_are_read_one_at_a_time_by_the_reader(warps: list[Warp], scene: Scene) -> None:
    read = []

    def reader(handle: Any) -> Warp:
        read.append(handle.dataId["visit"])
        if len(read) > 3:
            raise ValueError("the file is damaged")
        return warps[0]

    stream = WarpHandles(handles(7, 5, 6), reader)
    assert read == []
    assert stream[1] is warps[0]
    assert read == [6]
    assert stream[1:][1] is warps[0]
    assert stream[0] is warps[0]
    assert read == [6, 7, 5]
    with pytest.raises(RuntimeError, match="'visit': 7.*cannot be used: the file is damaged"):
        stream[2]
    assert PatchGeometry(scene.patch, scene.sky_projection).patch is warps[0].patch


def test_finer_quantum_finds_its_warps_in_the_normal_skymap(
    drp_repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("finer_drp") / "repo"
    shutil.copytree(drp_repo, path)
    butler = Butler.from_config(path, writeable=True)
    register_finer_skymap(butler, "deepprior_sim", 2, run="finer")
    pipeline = Pipeline.from_uri("$COADD_DEEPPRIOR_DIR/pipelines/finerDeepPriorCoadd.yaml")
    pipeline.addConfigFile("deepPriorCoadd", str(Path(__file__).parents[1] / "config" / "directWarps.py"))
    pipeline.addConfigOverride("plotDeepPriorCoadd", "warp_form", "exposure")
    graph = pipeline.to_graph(registry=butler.registry)
    builder = AllDimensionsQuantumGraphBuilder(
        graph, butler, input_collections=[RUN, "finer"], output_run="u/test/new"
    )
    built = builder.build(attach_datastore_records=False)
    quanta = list(built.get_task_quanta("deepPriorCoadd").values())
    assert len(quanta) == len(built.get_task_quanta("plotDeepPriorCoadd")) == 4
    for quantum in quanta:
        assert quantum.dataId["skymap"] == "deepprior_sim_x2"
        inputs = {dataset_type.name: refs for dataset_type, refs in quantum.inputs.items()}
        assert len(inputs["skyMap"]) == len(inputs["deep_coadd_visit_selection"]) == 1
        # Visits without an artifact mask are left out when the task runs.
        assert len(inputs["direct_warp"]) == 3
        assert len(inputs["compare_warp_artifact_mask"]) == 2
        for name in ("skyMap", "direct_warp", "compare_warp_artifact_mask", "deep_coadd_visit_selection"):
            assert {ref.dataId["skymap"] for ref in inputs[name]} == {"deepprior_sim"}
        for ref in inputs["direct_warp"]:
            assert ref.dataId["patch"] == quantum.dataId["patch"]
            assert ref.dataId["band"] == quantum.dataId["band"]
            assert ref.dataId["day_obs"] > 20200101
    butler.registry.removeDatasets(butler.query_datasets("skyMap", collections=RUN))
    builder = AllDimensionsQuantumGraphBuilder(
        graph, butler, input_collections=[RUN, "finer"], output_run="u/test/newer"
    )
    with pytest.raises(FileNotFoundError, match="input collections have no skyMap of the skymap that the w"):
        builder.build(attach_datastore_records=False)


def test_butler_takes_the_converter_to_exposures() -> None:
    """The file adds to the Butler's own definitions; a name that it misspells would be left out silently."""
    code = (
        "from lsst.daf.butler import StorageClassFactory\n"
        "exposure = StorageClassFactory().getStorageClass('ExposureF')\n"
        "print(exposure.converters['lsst.images.cells.CellCoadd'])\n"
        "print('lsst.images.VisitImage' in exposure.converters, 'coaddInputs' in exposure.components)\n"
    )
    config = Path(__file__).parents[1] / "config" / "butler"
    environment = os.environ | {"DAF_BUTLER_CONFIG_PATH": str(config)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    name = f"{to_exposure.__module__}.{to_exposure.__name__}"
    assert result.stdout.splitlines() == [name, "True True"]


def test_multiband_quantum_has_the_warps_of_all_bands(drp_repo: Path) -> None:
    butler = Butler.from_config(drp_repo)
    pipeline = Pipeline.from_uri("$COADD_DEEPPRIOR_DIR/pipelines/multibandDeepPriorCoadd.yaml")
    pipeline.addConfigFile(
        "deepPriorMultibandCoadd", str(Path(__file__).parents[1] / "config" / "directWarps.py")
    )
    pipeline.addConfigOverride("plotDeepPriorCoadd", "warp_form", "exposure")
    graph = pipeline.to_graph(registry=butler.registry)
    builder = AllDimensionsQuantumGraphBuilder(
        graph, butler, input_collections=[RUN], output_run="u/test/bands"
    )
    built = builder.build(attach_datastore_records=False)
    quanta = list(built.get_task_quanta("deepPriorMultibandCoadd").values())
    assert len(quanta) == 2
    assert len(built.get_task_quanta("measureDeepPriorCoadd")) == 4
    for quantum in quanta:
        assert set(quantum.dataId.dimensions.required) == {"tract", "patch", "skymap"}
        inputs = {dataset_type.name: refs for dataset_type, refs in quantum.inputs.items()}
        outputs = {dataset_type.name: refs for dataset_type, refs in quantum.outputs.items()}
        # Two of the three visits of each band have an artifact mask.
        assert len(inputs["direct_warp"]) == 4
        bands = {ref.dataId["band"] for ref in inputs["direct_warp"]}
        assert len(bands) == len(inputs["deep_coadd_visit_selection"]) == 2
        assert {ref.dataId["band"] for ref in outputs["deep_prior_coadd"]} == bands
        assert len(outputs["deep_prior_rgb"]) == 1
