# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The tasks without pipetask: on warps in memory, and on quanta of a small repository."""

from __future__ import annotations

import dataclasses
import errno
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import astropy.units as u
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from quick import quick_task

import lsst.pipe.base.testUtils
from lsst.coadd.deepprior.cells import make_cell_psf
from lsst.coadd.deepprior.coadd import make_coadds
from lsst.coadd.deepprior.deblend import DetectionSettings
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.observation_file import ObservationFile
from lsst.coadd.deepprior.tasks import deep_prior_coadd
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from lsst.coadd.deepprior.tasks.measure_deep_prior_coadd import (
    MeasureDeepPriorCoaddConfig,
    MeasureDeepPriorCoaddConnections,
    MeasureDeepPriorCoaddTask,
)
from lsst.coadd.deepprior.tasks.plot_deep_prior_coadd import (
    PlotDeepPriorCoaddConnections,
    PlotDeepPriorCoaddTask,
    best_visit,
)
from lsst.coadd.deepprior.warp_streams import WarpHandles, WarpObservations
from lsst.coadd.deepprior.warps import Warp
from lsst.daf.butler import Butler
from lsst.images import XY, YX
from lsst.images.cells import CellCoadd, CellGrid
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import ExecutionResources, InMemoryDatasetHandle, NoWorkFound, Struct


def handle(warp: Warp, dataset: object = None) -> InMemoryDatasetHandle:
    dataset = warp.to_cell_coadd() if dataset is None else dataset
    return InMemoryDatasetHandle(dataset, instrument=warp.instrument, visit=warp.visit)


def spoiled(warp: Warp) -> Warp:
    """Return the warp with no finite pixel."""
    return dataclasses.replace(warp, image=np.full_like(warp.image, np.nan))


class CountingWarps(Sequence[Warp]):
    """Warps that count how often each is asked for."""

    def __init__(self, warps: Sequence[Warp]) -> None:
        self._warps = warps
        self.reads = [0] * len(warps)

    def __len__(self) -> int:
        return len(self._warps)

    def __getitem__(self, index: int) -> Warp:  # type: ignore[override]
        warp = self._warps[index]
        self.reads[index] += 1
        return warp


@pytest.mark.parametrize(
    "connections",
    [DeepPriorCoaddConnections, MeasureDeepPriorCoaddConnections, PlotDeepPriorCoaddConnections],
)
def test_connections(connections: type) -> None:
    lsst.pipe.base.testUtils.lintConnections(connections)


def test_config_has_the_defaults_of_the_numerics() -> None:
    config = DeepPriorCoaddConfig()
    for field in dataclasses.fields(RestoreSettings):
        if field.name != "target_fwhm":
            assert getattr(config, field.name) == field.default, field.name
    measure = MeasureDeepPriorCoaddConfig()
    for field in dataclasses.fields(DetectionSettings):
        assert getattr(measure, field.name) == field.default, field.name
    for name, field in (config._fields | measure._fields).items():
        if name not in ("connections", "saveLogOutput"):
            assert field.doc.rstrip().endswith("."), name


def test_config_refuses_two_target_psfs() -> None:
    config = DeepPriorCoaddConfig(target_fwhm_arcsec=0.5)
    config.validate()
    config.target_fwhm_pixels = 2.5
    with pytest.raises(ValueError, match="not both"):
        config.validate()
    with pytest.raises(FieldValidationError):
        config.target_fwhm_pixels = 1.0


@pytest.mark.parametrize("field", ["init", "psf_mode", "device", "warp_form"])
def test_config_refuses_no_choice(field: str) -> None:
    config = DeepPriorCoaddConfig()
    setattr(config, field, None)
    with pytest.raises(ValueError, match=f"(?s)'{field}' failed validation.*None"):
        config.validate()


def test_config_refuses_letters_as_mask_planes() -> None:
    config = DeepPriorCoaddConfig()
    config.bad_mask_planes = []
    config.validate()
    config.bad_mask_planes = "SAT"  # as -c deepPriorCoadd:bad_mask_planes=SAT does
    with pytest.raises(ValueError, match="letters and not names"):
        config.validate()


def test_config_refuses_a_negative_seed() -> None:
    DeepPriorCoaddConfig(seed=0).validate()
    with pytest.raises(FieldValidationError):
        DeepPriorCoaddConfig(seed=-1)


def test_graph_building_imports_no_torch() -> None:
    """The modules that building a graph imports must load neither torch nor matplotlib nor afw."""
    code = (
        "import sys\n"
        "from lsst.coadd.deepprior.tasks import deep_prior_coadd, measure_deep_prior_coadd\n"
        "from lsst.coadd.deepprior.tasks import plot_deep_prior_coadd, deconvolve_with_deep_prior\n"
        "print({'torch', 'matplotlib', 'lsst.afw'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_outputs(restored: Struct, warps: list[Warp]) -> None:
    patch = warps[0].patch
    for coadd in (restored.coadd, restored.residual):
        assert isinstance(coadd, CellCoadd)
        assert coadd.bbox == patch.cells.bbox
        assert coadd.band == "r"
        assert coadd.metadata["steps"] == 2
        assert coadd.metadata["deepprior_version"]
        assert coadd.metadata["lsst_images_version"] == version("lsst-images")
        assert coadd.metadata["method"] == restored.metrics["method"]
        assert coadd.metadata["device"] == "cpu"
        assert coadd.metadata["bad_mask_planes"].split(",") == list(DeepPriorCoaddConfig().bad_mask_planes)
    visits = [warp.visit for warp in warps]
    assert set(restored.coadd.provenance.inputs["visit"]) == set(visits)
    metrics = restored.metrics
    assert yaml.safe_load(yaml.safe_dump(metrics)) == metrics
    assert [visit["visit"] for visit in metrics["visits"]] == visits
    assert metrics["left_out"] == []
    np.testing.assert_allclose(metrics["pixel_scale_arcsec"], 0.2, rtol=1e-3)


def test_target_psf_in_arcsec(warps: list[Warp]) -> None:
    result = quick_task(target_fwhm_arcsec=0.5).run(warps=warps)
    np.testing.assert_allclose(result.metrics["psf"]["target_fwhm_pixels"], 2.5, rtol=1e-3)


def test_warps_are_read_again_only_when_they_do_not_fit(warps: list[Warp], restored: Struct) -> None:
    cached, streamed = CountingWarps(warps), CountingWarps(warps)
    quick_task().run(warps=cached)
    result = quick_task(cache_gib=0.0).run(warps=streamed)
    assert cached.reads == [1] * len(warps)
    assert min(streamed.reads) > 1
    np.testing.assert_array_equal(result.coadd.image.array, restored.coadd.image.array)


def test_warps_are_read_again_when_the_job_has_little_memory(warps: list[Warp]) -> None:
    counted = CountingWarps(warps)
    quick_task(steps=0).run(warps=counted, memory_bytes=0.0)
    assert min(counted.reads) > 1
    counted = CountingWarps(warps)
    quick_task(steps=0).run(warps=counted, memory_bytes=1e9)
    assert max(counted.reads) == 1


@pytest.mark.parametrize(
    ("max_mem", "expected"),
    [
        (3 * u.GiB, 3 * 2**30),
        (None, None),
    ],
)
def test_a_quantum_says_how_much_memory_and_how_many_cores_there_are(
    max_mem: u.Quantity | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = quick_task()
    context = mock.MagicMock(resources=ExecutionResources(num_cores=3, max_mem=max_mem))
    monkeypatch.setattr(task, "run", mock.MagicMock())
    monkeypatch.setattr(deep_prior_coadd, "read_warps", mock.MagicMock())
    task.runQuantum(context, mock.MagicMock(), mock.MagicMock())
    given = task.run.call_args.kwargs
    assert (given["n_threads"], given["memory_bytes"]) == (3, expected)
    context.put.assert_called_once()


def test_visits_are_given_up_before_the_coadds_are_made(
    warps: list[Warp], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: weakref.WeakSet[Observation] = weakref.WeakSet()
    n_alive = []

    def noted(self: WarpObservations, index: int, observation: Observation) -> None:
        kept.add(observation)
        add(self, index, observation)

    def made(*arguments: Any, **settings: Any) -> tuple[CellCoadd, CellCoadd]:
        gc.collect()
        n_alive.append(len(kept))
        return make_coadds(*arguments, **settings)

    add = WarpObservations.add
    monkeypatch.setattr(WarpObservations, "add", noted)
    monkeypatch.setattr(deep_prior_coadd, "make_coadds", made)
    quick_task(steps=0).run(warps=warps)
    assert n_alive == [0]


def test_a_disk_keeps_what_memory_does_not(
    warps: list[Warp], restored: Struct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = CountingWarps(warps)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    result = quick_task(cache_gib=0.0, cache_dir="$SCRATCH").run(warps=on_disk)
    assert on_disk.reads == [1] * len(warps)
    np.testing.assert_array_equal(result.coadd.image.array, restored.coadd.image.array)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_it_can(
    warps: list[Warp],
    restored: Struct,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    append = ObservationFile.append

    def append_two(file: ObservationFile, observation: Observation) -> int:
        if len(file._entries) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(file, observation)

    monkeypatch.setattr(ObservationFile, "append", append_two)
    on_disk = CountingWarps(warps)
    with caplog.at_level(logging.WARNING):
        result = quick_task(cache_gib=0.0, cache_dir=str(tmp_path)).run(warps=on_disk)
    assert on_disk.reads[:2] == [1, 1]
    assert min(on_disk.reads[2:]) > 1
    assert caplog.text.count("cache_dir is full, and further warps will be read in every pass") == 1
    np.testing.assert_array_equal(result.coadd.image.array, restored.coadd.image.array)


def test_a_disk_that_cannot_be_used(warps: list[Warp], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cache_dir = '.*/missing' cannot be used"):
        quick_task(cache_dir=str(tmp_path / "missing")).run(warps=warps)
    with pytest.raises(RuntimeError, match="cache_dir = '.NOWHERE_AT_ALL' has an environment variable"):
        quick_task(cache_dir="$NOWHERE_AT_ALL").run(warps=warps)


def test_order_of_the_handles_does_not_matter(warps: list[Warp], restored: Struct) -> None:
    handles = WarpHandles([handle(warps[k]) for k in (2, 0, 3, 1)])
    result = quick_task().run(warps=handles)
    np.testing.assert_array_equal(result.coadd.image.array, restored.coadd.image.array)
    np.testing.assert_array_equal(result.residual.image.array, restored.residual.image.array)


def test_useless_warps_are_left_out(warps: list[Warp], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = quick_task().run(warps=[*warps[:2], spoiled(warps[2])])
    assert f"visit {warps[2].visit} has no usable pixel in the patch and is left out" in caplog.text
    assert result.metrics["left_out"] == [warps[2].label]
    assert set(result.coadd.provenance.inputs["visit"]) == {warp.visit for warp in warps[:2]}
    with pytest.raises(NoWorkFound, match="None of the 2 warps"):
        quick_task().run(warps=[spoiled(warp) for warp in warps[:2]])


def test_bad_mask_planes(warps: list[Warp]) -> None:
    """Pixels of a plane count or not as the configuration says."""
    planes = ["BAD", "CR"]
    strict = quick_task(bad_mask_planes=planes).run(warps=warps).metrics["visits"]
    loose = quick_task(bad_mask_planes=planes[:1]).run(warps=warps).metrics["visits"]
    gained = [other["good_fraction"] - one["good_fraction"] for one, other in zip(strict, loose, strict=True)]
    n_pixels = warps[0].patch.cells.bbox.area
    n_freed = [int((warp.flagged(["CR"]) & ~warp.flagged(["BAD"])).sum()) for warp in warps]
    assert max(n_freed) > 0
    np.testing.assert_allclose(gained, np.array(n_freed) / n_pixels, atol=1e-9)


def test_unusable_warp_is_named(warps: list[Warp]) -> None:
    class Broken(CellCoadd):
        def __init__(self) -> None:
            pass

    handles = WarpHandles([handle(warps[0]), handle(warps[1], Broken())])
    assert handles[0].visit == warps[0].visit
    with pytest.raises(RuntimeError, match=f"{warps[1].visit}.*cannot be used"):
        handles[1]


def test_warp_on_other_cells_is_named(warps: list[Warp]) -> None:
    """Warps of one patch that was defined twice: the same pixels in larger cells."""
    patch = warps[0].patch
    cells = CellGrid(bbox=patch.cells.bbox, cell_shape=YX(80, 36))
    psf = make_cell_psf(warps[1].psf_stamps[:1], cells)
    odd = dataclasses.replace(warps[1], patch=patch.model_copy(update={"cells": cells}), psf=psf)
    with pytest.raises(RuntimeError) as caught:
        quick_task().run(warps=[warps[0], odd, warps[2]])
    assert f"The cells of {odd.label}, of 36x80 pixels in " in str(caught.value)
    assert f"are not those of {warps[0].label}, of 36x40 pixels in " in str(caught.value)


def test_noise_that_is_larger_than_its_variance_is_told(
    warps: list[Warp], caplog: pytest.LogCaptureFixture
) -> None:
    wrong = [dataclasses.replace(warp, variance=warp.variance / 6.0) for warp in warps]
    with caplog.at_level(logging.WARNING):
        result = quick_task(steps=0).run(warps=wrong)
    chi2 = result.metrics["residual"]["chi2_per_pixel"]
    assert f"r band: data minus model are {chi2:.3g} times the noise, squared" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        quick_task(steps=0).run(warps=warps)
    assert "data minus model" not in caplog.text


def test_progress_is_logged(warps: list[Warp], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quick_task().run(warps=warps)
    label = f"tract 9, patch {warps[0].patch.id}, r band"
    assert f"{label}: restoring from 4 of 4 warps." in caplog.text
    assert f"{label}, fit: 2 of 2, loss" in caplog.text
    assert f"{label}, data steps: 6 of 6." in caplog.text
    assert f"{label}, points: 1 of " in caplog.text
    assert f"{label}, noise: 1 of 1, rms" in caplog.text


def test_gpu_that_is_not_there(warps: list[Warp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device 'cuda'"):
        quick_task(device="cuda").run(warps=warps)


def test_sources(restored: Struct, caplog: pytest.LogCaptureFixture) -> None:
    coadd = restored.coadd
    with caplog.at_level(logging.INFO):
        sources = MeasureDeepPriorCoaddTask().run(coadd=coadd, residual=restored.residual).sources
    assert len(sources) > 1
    assert f"tract 9, patch {coadd.patch.id}, r band: {len(sources)} sources." in caplog.text
    sky = coadd.sky_projection.pixel_to_sky(XY(x=np.asarray(sources["x"]), y=np.asarray(sources["y"])))
    np.testing.assert_allclose(sources["ra"], sky.ra.deg)
    np.testing.assert_allclose(sources["dec"], sky.dec.deg)
    assert np.all((sources["x"] > coadd.bbox.x.start) & (sources["x"] < coadd.bbox.x.stop))
    assert np.all((sources["y"] > coadd.bbox.y.start) & (sources["y"] < coadd.bbox.y.stop))
    np.testing.assert_allclose(
        sources["coadd_fwhm"],
        np.median([visit["fwhm_pixels"] for visit in restored.metrics["visits"]]),
        rtol=0.3,
    )


def test_plot(restored: Struct, warps: list[Warp]) -> None:
    sources = MeasureDeepPriorCoaddTask().run(coadd=restored.coadd, residual=restored.residual).sources
    figure = (
        PlotDeepPriorCoaddTask()
        .run(
            coadd=restored.coadd,
            residual=restored.residual,
            sources=sources,
            metrics=restored.metrics,
            best_warp=warps[1],
        )
        .plot
    )
    assert isinstance(figure, Figure)
    panels = [axes for axes in figure.axes if axes.images]
    start = warps[1].patch.cells.bbox.start
    box = warps[1].bbox
    shown = np.ma.filled(panels[1].images[0].get_array(), np.nan)
    y, x = box.y.start - start.y, box.x.start - start.x
    np.testing.assert_array_equal(shown[y : y + box.y.size, x : x + box.x.size], warps[1].image)
    assert np.isfinite(panels[0].images[0].get_array()).any()


def test_best_visit() -> None:
    visits = [
        {"visit": 1, "fwhm_pixels": 3.0, "good_fraction": 0.1},
        {"visit": 2, "fwhm_pixels": 5.0, "good_fraction": 0.9},
        {"visit": 3, "fwhm_pixels": 4.0, "good_fraction": 0.85},
    ]
    assert best_visit({"visits": visits})["visit"] == 3
    assert best_visit({"visits": visits[:1]})["visit"] == 1


def test_quanta(butler: Butler) -> None:
    """All three tasks, through `runQuantum`, on one patch and band of a repository."""
    patch_id = {"skymap": "deepprior_sim", "tract": 9, "patch": 1, "band": "r"}
    refs = butler.query_datasets(
        "deep_prior_warp", where="patch = 1 and band = 'r'", collections="deepprior/warps"
    )
    assert len(refs) == 3
    warp_ids = [dict(ref.dataId.required) for ref in refs]

    task = quick_task()
    quantum = lsst.pipe.base.testUtils.makeQuantum(
        task,
        butler,
        patch_id,
        {"warps": warp_ids} | dict.fromkeys(("coadd", "residual", "outliers", "metrics"), patch_id),
    )
    run = lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=True)
    assert len(run.call_args.kwargs["warps"]) == 3
    assert run.call_args.kwargs["n_threads"] == 1
    lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=False)
    coadd = butler.get("deep_prior_coadd", patch_id)
    assert coadd.patch.id == 1
    assert coadd.metadata["bad_mask_planes"].split(",") == list(task.config.bad_mask_planes)

    measure = MeasureDeepPriorCoaddTask()
    quantum = lsst.pipe.base.testUtils.makeQuantum(
        measure, butler, patch_id, dict.fromkeys(("coadd", "residual", "sources"), patch_id)
    )
    lsst.pipe.base.testUtils.runTestQuantum(measure, butler, quantum, mockRun=False)
    sources = butler.get("deep_prior_coadd_sources", patch_id)
    assert str(sources["flux"].unit) == "nJy"
    assert sources["flux"].description

    plot = PlotDeepPriorCoaddTask()
    inputs = dict.fromkeys(("coadd", "residual", "sources", "metrics", "plot"), patch_id)
    quantum = lsst.pipe.base.testUtils.makeQuantum(plot, butler, patch_id, {"warps": warp_ids} | inputs)
    run = lsst.pipe.base.testUtils.runTestQuantum(plot, butler, quantum, mockRun=True)
    best = best_visit(butler.get("deep_prior_coadd_metrics", patch_id))
    assert run.call_args.kwargs["best_warp"].visit == best["visit"]
    lsst.pipe.base.testUtils.runTestQuantum(plot, butler, quantum, mockRun=False)
    assert butler.getURI("deep_prior_coadd_plot", patch_id).exists()

    # The visit of the best seeing may not be among those of a run that makes the figure alone.
    others = [one for one in warp_ids if one["visit"] != best["visit"]]
    quantum = lsst.pipe.base.testUtils.makeQuantum(plot, butler, patch_id, {"warps": others} | inputs)
    with pytest.raises(
        RuntimeError, match=f"The warp of DeepPriorSim visit {best['visit']}, which the figure shows, "
    ):
        lsst.pipe.base.testUtils.runTestQuantum(plot, butler, quantum, mockRun=False)


@pytest.mark.parametrize(("steps", "patch"), [(0, 0), (2, 1)])
def test_a_quantum_leaves_the_checkpoint_of_another_alone(
    butler: Butler, tmp_path: Path, steps: int, patch: int
) -> None:
    """Without a fit the file is not touched; a fit writes it anew, and removes what it has written."""
    patch_id = {"skymap": "deepprior_sim", "tract": 9, "patch": patch, "band": "i"}
    refs = butler.query_datasets(
        "deep_prior_warp", where=f"patch = {patch} and band = 'i'", collections="deepprior/warps"
    )
    file = tmp_path / f"deepprior_sim_9_{patch}_i.safetensors"
    file.write_bytes(b"of another run")
    task = quick_task(steps=steps, checkpoint_dir=str(tmp_path))
    outputs = dict.fromkeys(("coadd", "residual", "outliers", "metrics"), patch_id)
    warp_ids = [dict(ref.dataId.required) for ref in refs]
    quantum = lsst.pipe.base.testUtils.makeQuantum(task, butler, patch_id, {"warps": warp_ids} | outputs)
    lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=False)
    assert butler.exists("deep_prior_coadd", patch_id)
    assert file.exists() == (steps == 0)
