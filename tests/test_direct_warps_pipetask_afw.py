# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Pipelines that read direct warps, in a full installation of the Science Pipelines; skipped without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import astropy.time
import numpy as np
import pytest
from afw_scene import (
    CORRECTION,
    NOISE,
    PATCH,
    PATCH_ID,
    PIPELINE,
    ROOT,
    RUN,
    STARS,
    VISITS,
    check_exposure,
    check_stars,
    detect,
    find_stars,
    make_exposure,
    make_sky_map,
    measure,
    stars_of,
)
from run_pipetask import QUICK, pipetask

import lsst.afw.detection
import lsst.afw.geom
import lsst.afw.image
import lsst.geom
import lsst.pipe.base.testUtils
import lsst.skymap
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.finer_skymap_dataset import register_finer_skymap
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.daf.butler import Butler, DatasetType, Timespan
from lsst.images import Box

SCALES = {VISITS[0]: 1.0, VISITS[1]: 2.5, VISITS[2]: 1.0, VISITS[3]: 0.25}
"""What carries the pixels of the visits in the repositories to nJy."""


def make_repo(path: Path, sky_map: lsst.skymap.BaseSkyMap) -> None:
    """Make a repository with a sky map, four direct warps with all companions, and a selection of three.

    Of the selected visits the first is in counts, the second is smaller than the patch, and the third is in
    counts and covers one half only. All have a pixel that is marked as an artifact, and one into which too
    many masked pixels were resampled.
    """
    Butler.makeRepo(str(path))
    butler = Butler.from_config(path, writeable=True, run="warps")
    registry = butler.registry
    registry.insertDimensionData("instrument", {"name": "Cam", "class_name": "none"})
    registry.insertDimensionData("physical_filter", {"instrument": "Cam", "name": "r_1", "band": "r"})
    registry.insertDimensionData("day_obs", {"instrument": "Cam", "id": 20250102})
    begin = astropy.time.Time("2025-01-02T03:00:00", scale="tai")
    end = astropy.time.Time("2025-01-02T03:00:30", scale="tai")
    region = sky_map[0][PATCH].getOuterSkyPolygon()
    for visit in VISITS:
        registry.insertDimensionData(
            "visit",
            {
                "instrument": "Cam",
                "id": visit,
                "name": str(visit),
                "physical_filter": "r_1",
                "day_obs": 20250102,
                "region": region,
                "timespan": Timespan(begin, end),
            },
        )
    sky_map.register("test", butler)
    lsst.afw.image.Mask.addMaskPlane("CLIPPED")
    of_warp = ("skymap", "tract", "patch", "instrument", "visit")
    of_patch = ("skymap", "tract", "patch", "band")
    for name, dimensions, storage_class in (
        ("direct_warp", of_warp, "ExposureF"),
        ("direct_warp_masked_fraction", of_warp, "ImageF"),
        ("deepCoadd_directWarp_noise0", of_warp, "MaskedImageF"),
        ("compare_warp_artifact_mask", of_warp, "Mask"),
        ("deep_coadd_visit_selection", ("instrument", *of_patch), "StructuredDataDict"),
        ("deep_coadd", of_patch, "ExposureF"),
        ("object_detection_merged", ("skymap", "tract", "patch"), "SourceCatalog"),
    ):
        registry.registerDatasetType(DatasetType(name, dimensions, storage_class, universe=butler.dimensions))
    inside = sky_map[0][PATCH].getOuterBBox()
    corner = inside.getMin()
    for visit in VISITS:
        exposure = make_exposure(sky_map, visit, SCALES[visit])
        if visit == VISITS[2]:
            small = lsst.geom.Box2I(corner + lsst.geom.Extent2I(0, 30), inside.getMax())
            exposure = exposure[small]
        artifacts = exposure.mask[exposure.getBBox().clippedTo(inside)].clone()
        artifacts[corner + lsst.geom.Extent2I(60, 50)] |= artifacts.getPlaneBitMask("CLIPPED")
        fraction = lsst.afw.image.ImageF(exposure.getBBox())
        fraction[corner + lsst.geom.Extent2I(60, 57)] = 0.6
        noise = lsst.afw.image.MaskedImageF(exposure.getBBox())
        noise.image.array[:, :] = 1.0
        for name, dataset in (
            ("direct_warp", exposure),
            ("direct_warp_masked_fraction", fraction),
            ("deepCoadd_directWarp_noise0", noise),
            ("compare_warp_artifact_mask", artifacts),
        ):
            butler.put(dataset, name, PATCH_ID, instrument="Cam", visit=visit)
    selection = dict.fromkeys(VISITS[1:], True)
    butler.put(selection, "deep_coadd_visit_selection", PATCH_ID, instrument="Cam", band="r")
    coadd = make_exposure(sky_map, VISITS[0])
    butler.put(coadd, "deep_coadd", PATCH_ID, band="r")
    catalog = detect(coadd)
    beyond = lsst.afw.geom.SpanSet.fromShape(8, offset=coadd.getBBox().getMax())
    catalog.addNew().setFootprint(lsst.afw.detection.Footprint(beyond))
    butler.put(catalog, "object_detection_merged", PATCH_ID)


@pytest.fixture(scope="module", params=[True, False], ids=["cells", "no_cells"])
def restored_repo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, lsst.skymap.BaseSkyMap]:
    """A repository with the coadd that pipetask has restored, and its sky map, with cells or without."""
    sky_map = make_sky_map(cells=request.param)
    path = tmp_path_factory.mktemp("direct_warps") / "repo"
    make_repo(path, sky_map)
    result = pipetask(
        *("run", "-b", path, "-i", "warps,skymaps", "-o", RUN, "--register-dataset-types"),
        *("-p", f"{PIPELINE}#catalogue"),
        *QUICK,
        *("-c", "deepPriorCoadd:base_steps=240", "-c", "deepPriorCoadd:init=scratch"),
        *("-c", "deepPriorCoadd:steps=0", "-c", "deepPriorCoadd:target_fwhm_pixels=2.0"),
        *("-c", "deepPriorCoadd:max_masked_fraction=0.5", "-c", "deepPriorCoadd:cell_size=64"),
    )
    assert result.returncode == 0, result.stdout
    return path, sky_map


def test_pipetask(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    """Direct warps from a Butler, and the restored coadd read back from it in all its forms."""
    path, sky_map = restored_repo
    butler = Butler.from_config(path, collections=RUN)
    coadd = butler.get("deep_prior_coadd", PATCH_ID, band="r")
    assert set(coadd.provenance.inputs["visit"]) == set(VISITS[1:])
    exposure: Any = butler.get("deep_prior_coadd", PATCH_ID, band="r", storageClass="ExposureF")
    check_exposure(exposure, coadd)
    check_stars(measure(exposure), stars_of(sky_map), CORRECTION)
    cells: Any = butler.get("deep_prior_coadd", PATCH_ID, band="r", storageClass="MultipleCellCoadd")
    assert cells.stitch().asExposure().getInfo().getCoaddInputs() is not None
    exposure = to_exposure(coadd)
    check_exposure(exposure, coadd)
    check_stars(measure(exposure, apply_corrections=True), stars_of(sky_map), 1.0)


def test_exposure_with_all_components(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    """The storage classes of this package have the Butler convert coadds to exposures that lack nothing."""
    path, sky_map = restored_repo
    center = sky_map[0][PATCH].getInnerBBox().getCenter()
    code = (
        "import lsst.geom\n"
        "from lsst.daf.butler import Butler\n"
        f"butler = Butler.from_config({str(path)!r}, collections={RUN!r})\n"
        f"exposure = butler.get('deep_prior_coadd', {PATCH_ID!r}, band='r', storageClass='ExposureF')\n"
        "print(*(record['visit'] for record in exposure.getInfo().getCoaddInputs().visits))\n"
        "correction = exposure.getInfo().getApCorrMap()['base_PsfFlux_instFlux']\n"
        f"print(correction.evaluate(lsst.geom.Point2D({center.x}, {center.y})))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"DAF_BUTLER_CONFIG_PATH": str(ROOT / "config" / "butler")},
    )
    visits, correction = result.stdout.splitlines()
    assert set(map(int, visits.split())) == set(VISITS[1:])
    assert float(correction) == pytest.approx(CORRECTION, rel=1e-6)


def test_companions_from_a_butler(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    path, sky_map = restored_repo
    butler = Butler.from_config(path, run="warps", writeable=True)
    butler.put(sky_map, "skyMap", skymap="test")  # makeQuantum looks for inputs in one run only
    config = DeepPriorCoaddTask.ConfigClass(warp_form="exposure", cell_size=64, n_noise_warps=1)
    config.update(select_visits=True, use_artifact_masks=True, max_masked_fraction=0.5)
    task = DeepPriorCoaddTask(config=config)
    of_band = PATCH_ID | {"band": "r"}
    names = ("direct_warps", "artifact_masks", "masked_fractions", "noise0_warps")
    of_warps = [PATCH_ID | {"instrument": "Cam", "visit": visit} for visit in VISITS]
    outputs = dict.fromkeys(("coadd", "residual", "outliers", "metrics"), of_band)
    quantum = lsst.pipe.base.testUtils.makeQuantum(
        task,
        butler,
        of_band,
        dict.fromkeys(names, of_warps)
        | {"selected_visits": [of_band | {"instrument": "Cam"}], "sky_map": {"skymap": "test"}}
        | outputs,
    )
    run = lsst.pipe.base.testUtils.runTestQuantum(task, butler, quantum, mockRun=True)
    warps = run.call_args.kwargs["warps"]
    assert [warp.visit for warp in warps] == list(VISITS[1:])
    corner = Box.from_legacy(sky_map[0][PATCH].getOuterBBox()).start
    for warp in warps:
        start = warp.bbox.start
        assert np.argwhere(warp.mask.get("BAD")).tolist() == [
            [corner.y + 57 - start.y, corner.x + 60 - start.x]
        ]
        clipped = [[corner.y + 50 - start.y, corner.x + 60 - start.x]]
        assert np.argwhere(warp.mask.get("CLIPPED")).tolist() == clipped
        np.testing.assert_allclose(warp.noise[0], SCALES[warp.visit], rtol=1e-6)
        assert np.nanmedian(warp.variance) == pytest.approx(NOISE**2, rel=1e-5)
    assert warps[1].bbox.y.start == corner.y + 30


def test_finer_pixels(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    """Direct warps restored on pixels of half the size: stars are where they are in these pixels."""
    path, sky_map = restored_repo
    register_finer_skymap(Butler.from_config(path, writeable=True), "test", 2, run="finer")
    result = pipetask(
        *("run", "-b", path, "-i", "warps,skymaps,finer", "-o", "u/test/finer", "--register-dataset-types"),
        *("-p", "$COADD_DEEPPRIOR_DIR/pipelines/finerDeepPriorCoadd.yaml#restoration"),
        *("-C", "deepPriorCoadd:$COADD_DEEPPRIOR_DIR/config/directWarps.py"),
        *QUICK,
        *("-c", "deepPriorCoadd:base_steps=240", "-c", "deepPriorCoadd:init=scratch"),
        *("-c", "deepPriorCoadd:steps=0", "-c", "deepPriorCoadd:cell_size=64"),
        COADD_DEEPPRIOR_DIR=str(ROOT),
    )
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(path, collections="u/test/finer")
    of_band = PATCH_ID | {"skymap": "test_x2", "band": "r"}
    exposure: Any = butler.get("deep_prior_coadd", of_band, storageClass="ExposureF")
    tract_wcs, wcs = sky_map[0].getWcs(), exposure.getWcs()
    stars = []
    for x, y, flux in stars_of(sky_map):
        position = wcs.skyToPixel(tract_wcs.pixelToSky(lsst.geom.Point2D(x, y)))
        assert (position.x, position.y) == pytest.approx((2.0 * x + 0.5, 2.0 * y + 0.5), abs=1e-4)
        stars.append((position.x, position.y, flux))
    find_stars(measure(exposure), stars)


def test_deconvolution(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    path, sky_map = restored_repo
    result = pipetask(
        *("run", "-b", path, "-i", f"{RUN},warps,skymaps", "-o", "u/test/deconvolved"),
        *("--register-dataset-types", "-p"),
        "$COADD_DEEPPRIOR_DIR/pipelines/_ingredients/deconvolution.yaml#deconvolve",
    )
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(path, collections=["u/test/deconvolved", RUN, "warps"])
    deconvolved: Any = butler.get("deconvolved_deep_coadd", PATCH_ID, band="r")
    restored = butler.get("deep_prior_coadd", PATCH_ID, band="r").image
    catalog: Any = butler.get("object_detection_merged", PATCH_ID)
    assert len(catalog) == len(STARS) + 1  # and a sky object that reaches beyond the coadd
    footprints = lsst.afw.image.ImageI(deconvolved.getBBox())
    for record in catalog:
        record.getFootprint().spans.clippedTo(footprints.getBBox()).setImage(footprints, 1)
    assert not deconvolved.image.array[footprints.array == 0].any()
    box = restored.bbox.intersection(Box.from_legacy(deconvolved.getBBox()))
    inside = footprints[box.to_legacy()].array == 1
    assert inside.any()
    expected = restored[box].array.clip(min=0.0)
    np.testing.assert_array_equal(deconvolved.image[box.to_legacy()].array[inside], expected[inside])


def test_standard_tasks(restored_repo: tuple[Path, lsst.skymap.BaseSkyMap]) -> None:
    """Detection, deblending, measurement and forced photometry of Data Release Production."""
    pytest.importorskip("lsst.pipe.tasks.multiBand")
    pytest.importorskip("lsst.meas.extensions.scarlet.deconvolveExposureTask")
    pytest.importorskip("lsst.drp.tasks.forcedPhotCoadd")
    path, sky_map = restored_repo
    labels = (
        "detectDeepPriorPeaks",
        "mergeDeepPriorDetection",
        "deconvolveDeepPrior",
        "deblendDeepPriorFootprints",
        "measureDeepPriorUnforced",
        "mergeDeepPriorMeasurement",
        "measureDeepPriorForced",
    )
    result = pipetask(
        *("run", "-b", path, "-i", f"{RUN},skymaps", "-o", "u/test/objects", "--register-dataset-types"),
        *("-p", f"{PIPELINE}#{','.join(labels)}"),
        *("-c", "mergeDeepPriorDetection:priorityList=['r']"),
        *("-c", "mergeDeepPriorMeasurement:priorityList=['r']"),
        # More of them would reach beyond the cells of this small patch, where the deconvolution fails.
        *("-c", "mergeDeepPriorDetection:skyObjects.nSources=3"),
        *("-c", "measureDeepPriorUnforced:doPropagateFlags=False"),
    )
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(path, collections="u/test/objects")
    sources: Any = butler.get("deep_prior_object_unforced_measurement", PATCH_ID, band="r")
    table = sources.copy(deep=True).asAstropy()
    check_stars(table, stars_of(sky_map), 1.0)
    forced: Any = butler.get("deep_prior_object_forced_measurement", PATCH_ID, band="r")
    bright = np.asarray(table["base_PsfFlux_instFlux"]) > 0.5 * min(flux for *_, flux in STARS)
    assert bright.sum() == len(STARS)
    np.testing.assert_allclose(
        forced["base_PsfFlux_instFlux"][bright], table["base_PsfFlux_instFlux"][bright]
    )
    middle = sky_map[0][PATCH].getOuterBBox().getCenter().x
    # The last visit covers the left half only.
    expected = np.where(table["base_SdssCentroid_x"] < middle, 3, 2)
    np.testing.assert_array_equal(table["base_InputCount_value"][bright], expected[bright])
