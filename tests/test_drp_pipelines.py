# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The full-stack pipelines against the names that drp_pipe gives the same tasks.

The standard tasks themselves need afw; their configs are compared as the YAML has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lsst.coadd.deepprior.tasks.deconvolve_with_deep_prior import MODEL_FWHM
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.pex.config import Config, ConfigField, Field, RegistryField, makeRegistry
from lsst.pipe.base import Pipeline
from lsst.resources import ResourcePath

NAMES = yaml.safe_load((Path(__file__).parent / "data" / "drp_pipe_names.yaml").read_text())
CAMERAS = NAMES["cameras"]
PIPELINES = "$COADD_DEEPPRIOR_DIR/pipelines"
OURS = {"deepPriorCoadd", "measureDeepPriorCoadd", "plotDeepPriorCoadd"}
RESTORED = {
    "deep_prior_coadd",
    "deep_prior_residual",
    "deep_prior_coadd_outliers",
    "deep_prior_coadd_metrics",
}
ROLES = {"detection_coadd", "deblending_coadd", "measurement_coadd"}


def standard_tasks(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Return class and config of the tasks of a pipeline that are not ours, parameters filled in."""
    ir = yaml.safe_load(str(pipeline))
    tasks = {}
    for label, task in ir["tasks"].items():
        if label not in OURS:
            (config,) = task["config"]
            values = {
                key: ir["parameters"][value.removeprefix("parameters.")]
                if str(value).startswith("parameters.")
                else value
                for key, value in config.items()
            }
            tasks[label] = {"class": task["class"], "config": values}
    return tasks


def connections(config: dict[str, Any]) -> dict[str, str]:
    prefix = "connections."
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


def our_graph(location: str) -> Any:
    """Return the graph of those of our tasks in a pipeline, without the overrides of an obs package."""
    pipeline = Pipeline.from_uri(location)
    ir = yaml.safe_load(str(pipeline))
    ir.pop("instrument", None)
    return Pipeline.fromString(yaml.safe_dump(ir)).to_graph()


@pytest.fixture(params=sorted(CAMERAS))
def camera(request: pytest.FixtureRequest) -> str:
    return request.param


def test_labels_and_subsets(camera: str) -> None:
    pipeline = Pipeline.from_uri(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml")
    standard = {task["ours"] for task in NAMES["tasks"].values()}
    assert set(pipeline.task_labels) == OURS | standard
    assert pipeline.subsets == {"restoration": {"deepPriorCoadd"}, "catalogue": OURS, "objects": standard}
    assert pipeline.getInstrument() == CAMERAS[camera]["instrument"]


def test_labels_and_outputs_are_apart_from_the_standard_ones(camera: str) -> None:
    """Labels name datasets too: those of configs, logs and metadata."""
    tasks = standard_tasks(Pipeline.from_uri(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml"))
    assert not tasks.keys() & NAMES["tasks"].keys()
    names = [
        connections(tasks[standard["ours"]]["config"])[output]
        for standard in NAMES["tasks"].values()
        for output in standard["outputs"]
    ]
    taken = {name for task in NAMES["tasks"].values() for name in task["outputs"].values()}
    assert len(set(names)) == len(names)
    assert not set(names) & (taken | RESTORED)
    assert all(name.startswith("deep_prior_") for name in names)


def test_standard_tasks_read_what_is_written_for_them(camera: str) -> None:
    """Each connection of each task is that of its counterpart, with our datasets for those of drp_pipe."""
    tasks = standard_tasks(Pipeline.from_uri(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml"))
    renamed = {"deep_coadd_cell_predetection": "deep_prior_coadd"}
    for standard in NAMES["tasks"].values():
        ours = connections(tasks[standard["ours"]]["config"])
        renamed |= {name: ours[output] for output, name in standard["outputs"].items()}
    for standard in NAMES["tasks"].values():
        task = tasks[standard["ours"]]
        ours = connections(task["config"])
        assert task["class"] == standard["class"]
        assert ours.keys() <= standard["inputs"].keys() | standard["outputs"].keys()
        for connection, name in standard["inputs"].items():
            expected = CAMERAS[camera].get(connection)
            if expected is None:
                dataset, dot, component = name.partition(".")
                expected = renamed.get(dataset, dataset) + dot + component
            assert ours.get(connection, name) == expected, (standard["ours"], connection)
    reads_cells = {
        label for label, task in tasks.items() if "deep_prior_coadd" in connections(task["config"]).values()
    }
    assert len(reads_cells) == 8
    for label in reads_cells:
        config = tasks[label]["config"]
        assert config.get("useCellCoadds", config.get("use_cell_coadds")) is True


def test_one_parameter_says_which_coadd_each_step_reads() -> None:
    pipeline = Pipeline.from_uri(f"{PIPELINES}/DRP-deepPrior.yaml")
    before = standard_tasks(pipeline)
    assert {yaml.safe_load(str(pipeline))["parameters"][role] for role in ROLES} == {"deep_prior_coadd"}
    changed = set()
    for role in ROLES:
        ir = yaml.safe_load(str(pipeline))
        ir["parameters"][role] = "deep_prior_measure_coadd"
        after = standard_tasks(Pipeline.fromString(yaml.safe_dump(ir)))
        differ = {label for label in after if after[label] != before[label]}
        assert differ
        assert not differ & changed
        changed |= differ
    reads = {
        label for label, task in before.items() if "deep_prior_coadd" in connections(task["config"]).values()
    }
    assert changed == reads


def test_restoration_reads_the_datasets_of_the_camera(camera: str) -> None:
    names = CAMERAS[camera]
    graph = our_graph(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml#catalogue")
    task = graph.tasks["deepPriorCoadd"]
    read = {edge.connection_name: edge.dataset_type_name for edge in task.iter_all_inputs()}
    assert read == {
        "direct_warps": names["direct_warps"],
        "artifact_masks": names["artifact_masks"],
        "selected_visits": names["selected_visits"],
        "sky_map": "skyMap",
    }
    classes = {edge.connection_name: edge.storage_class_name for edge in task.iter_all_inputs()}
    assert classes == {name: NAMES["storage_classes"][name] for name in read}
    assert {edge.dataset_type_name for edge in task.outputs.values()} == RESTORED
    plot = graph.tasks["plotDeepPriorCoadd"]
    assert names["direct_warps"] in {edge.dataset_type_name for edge in plot.iter_all_inputs()}


def test_config_of_the_restoration(camera: str) -> None:
    config = our_graph(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml#restoration").tasks["deepPriorCoadd"].config
    config.validate()
    assert (config.warp_form, config.select_visits, config.use_artifact_masks) == ("exposure", True, True)
    of_camera = {"PARTLY_VIGNETTED", "SPIKE"} if camera == "LSSTCam" else set()
    assert set(config.bad_mask_planes) == set(DeepPriorCoaddConfig().bad_mask_planes) - {"EDGE"} | of_camera


def test_masked_fractions_and_noise_have_the_names_of_drp_pipe(camera: str) -> None:
    ir = yaml.safe_load(str(Pipeline.from_uri(f"{PIPELINES}/{camera}/DRP-deepPrior.yaml#restoration")))
    ir.pop("instrument")
    ir["tasks"]["deepPriorCoadd"]["config"].append({"max_masked_fraction": 0.5, "n_noise_warps": 2})
    task = Pipeline.fromString(yaml.safe_dump(ir)).to_graph().tasks["deepPriorCoadd"]
    read = {edge.connection_name: edge.dataset_type_name for edge in task.iter_all_inputs()}
    assert read["masked_fractions"] == CAMERAS[camera]["masked_fractions"]
    noise = CAMERAS[camera]["noise_warps"]
    assert (read["noise0_warps"], read["noise1_warps"]) == (f"{noise}0", f"{noise}1")
    classes = {edge.connection_name: edge.storage_class_name for edge in task.iter_all_inputs()}
    for name in ("masked_fractions", "noise0_warps"):
        assert classes[name] == NAMES["storage_classes"][name]


def test_deconvolution_is_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline with the labels of drp_pipe, of which ours replaces the deconvolution."""
    standard = NAMES["tasks"]
    labels = ("mergeObjectDetection", "deconvolve", "deblendCoaddFootprints")
    drp = {
        "description": "Some tasks of drp_pipe.",
        "tasks": {label: {"class": standard[label]["class"]} for label in labels},
        "subsets": {"stage3-coadd": {"subset": list(labels)}},
    }
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "DRP.yaml").write_text(yaml.safe_dump(drp))
    monkeypatch.setenv("DRP_PIPE_DIR", str(tmp_path))
    swapped = Pipeline.fromString(
        """
        description: Production with restored images for the deblender.
        imports:
          - location: $DRP_PIPE_DIR/pipelines/DRP.yaml
            exclude: [deconvolve]
            labeledSubsetModifyMode: EDIT
          - location: $COADD_DEEPPRIOR_DIR/pipelines/_ingredients/deconvolution.yaml
        tasks:
          deepPriorCoadd:
            class: lsst.coadd.deepprior.tasks.deep_prior_coadd.DeepPriorCoaddTask
            config:
              file: $COADD_DEEPPRIOR_DIR/config/LSSTCam/deepPriorCoadd.py
        """
    )
    ir = yaml.safe_load(str(swapped))
    ours = {"tasks": {"deepPriorCoadd": ir["tasks"]["deepPriorCoadd"]}, "parameters": ir["parameters"]}
    only_ours = Pipeline.fromString(yaml.safe_dump({"description": "Ours."} | ours))
    config = only_ours.to_graph().tasks["deepPriorCoadd"].config
    assert {"PARTLY_VIGNETTED", "SPIKE"} < set(config.bad_mask_planes)
    assert config.target_fwhm_pixels == MODEL_FWHM
    assert set(swapped.task_labels) == {*labels, "deepPriorCoadd"}
    assert swapped.subsets == {
        "stage3-coadd": {"mergeObjectDetection", "deblendCoaddFootprints"},
        "deconvolution": {"deepPriorCoadd", "deconvolve"},
    }
    graph = Pipeline.from_uri(f"{PIPELINES}/_ingredients/deconvolution.yaml").to_graph()
    task = graph.tasks["deconvolve"]
    assert {edge.dataset_type_name for edge in task.outputs.values()} == set(
        standard["deconvolve"]["outputs"].values()
    )
    (output,) = task.outputs.values()
    assert output.storage_class_name == "ExposureF"
    assert {edge.dataset_type_name for edge in task.iter_all_inputs()} == {
        "deep_coadd",
        "deep_prior_coadd",
        standard["deconvolve"]["inputs"]["catalog"],
    }
    assert graph.tasks["deepPriorCoadd"].config.target_fwhm_pixels == MODEL_FWHM


def test_shear_is_not_measured_on_restored_coadds() -> None:
    """The override works on a registry of plugins, as measurement tasks have, with the plugin or without."""

    class PluginConfig(Config):
        """Config of a plugin."""

        use = Field[bool](doc="Anything.", default=True)

    def configured(*names: str) -> Config:
        registry = makeRegistry("Plugins.", PluginConfig)
        for name in names:
            registry.register(name, PluginConfig, ConfigClass=PluginConfig)

        class MeasurementConfig(Config):
            """The part of a measurement config that is overridden."""

            plugins = RegistryField("Plugins.", registry, default=list(names), multi=True)

        class TaskConfig(Config):
            """Config of a task that measures."""

            measurement = ConfigField("Measurement.", MeasurementConfig)

        config = TaskConfig()
        config.load(ResourcePath("$COADD_DEEPPRIOR_DIR/config/measureRestoredCoadd.py"))
        return config

    both = configured("base_PsfFlux", "ext_shapeHSM_HsmShapeRegauss")
    assert set(both.measurement.plugins.names) == {"base_PsfFlux"}
    assert set(configured("base_PsfFlux").measurement.plugins.names) == {"base_PsfFlux"}
    tasks = standard_tasks(Pipeline.from_uri(f"{PIPELINES}/DRP-deepPrior.yaml"))
    assert tasks["measureDeepPriorUnforced"]["config"]["file"] == [
        "$COADD_DEEPPRIOR_DIR/config/measureRestoredCoadd.py"
    ]
