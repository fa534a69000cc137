# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Direct warps in and exposures out, with real objects of the Science Pipelines; skipped without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lsst.afw.image")
pytest.importorskip("lsst.cell_coadds")
pytest.importorskip("lsst.meas.algorithms")
pytest.importorskip("lsst.meas.base")
pytest.importorskip("lsst.skymap")

import astropy.time
from run_pipetask import QUICK, pipetask

import lsst.afw.geom
import lsst.afw.image
import lsst.afw.math
import lsst.afw.table
import lsst.geom
import lsst.meas.algorithms
import lsst.meas.base
import lsst.skymap
from lsst.coadd.deepprior.direct_warps import PatchGeometry, patch_from_skymap, warp_from_exposure
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.tasks.deconvolve_with_deep_prior import DeconvolveWithDeepPriorTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.warps import InvalidWarpError, Warp
from lsst.daf.butler import Butler, DatasetType, Timespan
from lsst.images import Box
from lsst.pipe.base import Struct

PATCH = 4  # in the second row of patches, so that its pixels do not start at (0, 0)
NOISE = 10.0  # nJy in a pixel
STARS = ((0.3, 0.4, 60000.0), (0.7, 0.3, 30000.0), (0.45, 0.75, 45000.0))
"""Positions x, y as fractions of the patch, and fluxes in nJy."""
VISITS = (901, 902, 903, 904)
CORRECTION = 1.03
LEFT, RIGHT = 11, 12
"""Detectors, left and right of the middle of the patch; visit 904 has only the left one."""


def make_sky_map(cells: bool) -> lsst.skymap.BaseSkyMap:
    """Make a sky map with one tract of several patches, with cells of 40x40 pixels or without cells."""
    config = lsst.skymap.DiscreteSkyMap.ConfigClass()
    config.raList, config.decList, config.radiusList = [10.0], [-20.0], [0.012]
    config.pixelScale = 0.2
    config.projection = "TAN"
    config.tractOverlap = 0.0
    if cells:
        config.tractBuilder.name = "cells"
        config.tractBuilder["cells"].cellInnerDimensions = [40, 40]
        config.tractBuilder["cells"].cellBorder = 5
        config.tractBuilder["cells"].numCellsPerPatchInner = 3
        config.tractBuilder["cells"].numCellsInPatchBorder = 1
    else:
        config.tractBuilder["legacy"].patchInnerDimensions = [150, 140]
        config.tractBuilder["legacy"].patchBorder = 20
    return lsst.skymap.DiscreteSkyMap(config)


@pytest.fixture(scope="module")
def sky_map() -> lsst.skymap.BaseSkyMap:
    return make_sky_map(cells=True)


@pytest.fixture(scope="module")
def geometry(sky_map: lsst.skymap.BaseSkyMap) -> PatchGeometry:
    return patch_from_skymap(sky_map, "test", 0, PATCH, 150)


def data_id(visit: int) -> dict[str, Any]:
    return {
        "instrument": "Cam",
        "visit": visit,
        "physical_filter": "r_1",
        "band": "r",
        "day_obs": 20250102,
    }


def make_inputs(
    bbox: lsst.geom.Box2I, wcs: lsst.afw.geom.SkyWcs, detectors: list[int], visit: int, sigma: float
) -> lsst.afw.image.CoaddInputs:
    """Make the table of detectors, the pixels of each of which are those of the tract less an offset."""
    schema = lsst.afw.table.ExposureTable.makeMinimalSchema()
    schema.addField("visit", type=np.int64, doc="Visit ID.")
    ccd_schema = lsst.afw.table.Schema(schema)
    ccd_schema.addField("ccd", type=np.int32, doc="Detector ID.")
    ccd_schema.addField("weight", type=np.float64, doc="Weight.")
    inputs = lsst.afw.image.CoaddInputs(schema, ccd_schema)
    middle = (bbox.beginX + bbox.endX) // 2
    for detector in detectors:
        part = lsst.geom.Box2I(bbox)
        if detector == LEFT:
            part = lsst.geom.Box2I(bbox.getMin(), lsst.geom.Extent2I(middle - bbox.beginX, bbox.getHeight()))
        elif detector == RIGHT:
            start = lsst.geom.Point2I(middle, bbox.beginY)
            part = lsst.geom.Box2I(start, lsst.geom.Extent2I(bbox.endX - middle, bbox.getHeight()))
        offset = lsst.geom.Extent2I(part.getMin())
        record = inputs.ccds.addNew()
        record["visit"], record["ccd"], record["weight"] = visit, detector, 1.0
        record.setWcs(wcs.copyAtShiftedPixelOrigin(lsst.geom.Extent2D(-offset)))
        own = lsst.geom.Box2I(lsst.geom.Point2I(0, 0), part.getDimensions())
        record.setBBox(own)
        record.setPsf(lsst.meas.algorithms.SingleGaussianPsf(25, 25, sigma))
        corrections = lsst.afw.image.ApCorrMap()
        for name, value in (("base_PsfFlux_instFlux", CORRECTION), ("base_PsfFlux_instFluxErr", 0.0)):
            corrections[name] = lsst.afw.math.ChebyshevBoundedField(own, np.array([[value]]))
        record.setApCorrMap(corrections)
    return inputs


def make_exposure(
    sky_map: lsst.skymap.BaseSkyMap, visit: int, scale: float = 1.0
) -> lsst.afw.image.ExposureF:
    """Make a direct warp that is larger than its patch, of pixels that ``scale`` carries to nJy."""
    tract_info = sky_map[0]
    patch_box = tract_info[PATCH].getOuterBBox()
    bbox = lsst.geom.Box2I(patch_box)
    bbox.grow(lsst.geom.Extent2I(23, 17))
    rng = np.random.default_rng(visit)
    sigma = 1.7 + 0.1 * VISITS.index(visit)
    wcs = tract_info.getWcs()
    detectors = [LEFT] if visit == VISITS[-1] else [LEFT, RIGHT]
    inputs = make_inputs(bbox, wcs, detectors, visit, sigma)
    exposure = lsst.afw.image.ExposureF(bbox, wcs)
    exposure.image.array[:, :] = rng.normal(scale=NOISE, size=exposure.image.array.shape)
    exposure.variance.array[:, :] = NOISE**2
    for x, y, flux in star_positions(patch_box):
        stamp = lsst.meas.algorithms.SingleGaussianPsf(25, 25, sigma).computeImage(lsst.geom.Point2D(x, y))
        box = stamp.getBBox().clippedTo(bbox)
        exposure.image[box].array[:, :] += flux / CORRECTION * stamp[box].array
    if detectors == [LEFT]:
        right = exposure.image.array.shape[1] // 2
        exposure.image.array[:, right:] = np.nan
        exposure.mask.array[:, right:] |= exposure.mask.getPlaneBitMask("NO_DATA")
    exposure.image.array[:, :] /= scale
    exposure.variance.array[:, :] /= scale**2
    exposure.setPhotoCalib(lsst.afw.image.PhotoCalib(scale))
    exposure.setFilter(lsst.afw.image.FilterLabel(band="r", physical="r_1"))
    exposure.getInfo().setCoaddInputs(inputs)
    exposure.setPsf(lsst.meas.algorithms.CoaddPsf(inputs.ccds, wcs))
    exposure.getInfo().setApCorrMap(lsst.meas.algorithms.makeCoaddApCorrMap(inputs.ccds, bbox, wcs))
    return exposure


def star_positions(box: lsst.geom.Box2I) -> list[tuple[float, float, float]]:
    return [
        (box.beginX + fx * box.getWidth(), box.beginY + fy * box.getHeight(), flux) for fx, fy, flux in STARS
    ]


@pytest.fixture(scope="module")
def warps(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> list[Warp]:
    return [warp_from_exposure(make_exposure(sky_map, visit), data_id(visit), geometry) for visit in VISITS]


@pytest.fixture(scope="module")
def restored(warps: list[Warp]) -> Struct:
    config = DeepPriorCoaddTask.ConfigClass(target_fwhm_pixels=2.0)
    config.update(init="scratch", base_steps=240, steps=0, n_variance_draws=2, device="cpu")
    return DeepPriorCoaddTask(config=config).run(warps=warps)


def test_cells_are_those_of_the_sky_map(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> None:
    patch_info = sky_map[0][PATCH]
    cells = geometry.patch.cells
    for info in patch_info:
        box = info.inner_bbox
        found = cells.bbox_of(cells.index_of(y=box.beginY, x=box.beginX))
        assert found == Box.from_legacy(box)
    assert cells.grid_size.as_tuple() == (5, 5)
    assert geometry.patch.inner_bbox == Box.from_legacy(patch_info.getInnerBBox())
    assert cells.bbox.start.y > 0
    point = lsst.geom.Point2D(cells.bbox.x.start + 3.5, cells.bbox.y.start + 60.25)
    sky = geometry.sky_projection.pixel_to_sky(x=point.x, y=point.y)
    expected = sky_map[0].getWcs().pixelToSky(point)
    np.testing.assert_allclose(
        [sky.ra.deg, sky.dec.deg],
        [expected.getRa().asDegrees(), expected.getDec().asDegrees()],
        rtol=0.0,
        atol=1e-10,
    )


def test_patch_of_a_sky_map_without_cells_is_cut_into_cells() -> None:
    sky_map = make_sky_map(cells=False)
    geometry = patch_from_skymap(sky_map, "test", 0, PATCH, 64)
    outer = Box.from_legacy(sky_map[0][PATCH].getOuterBBox())
    cells = geometry.patch.cells
    assert cells.bbox.start == outer.start
    assert cells.bbox.contains(outer)
    assert (cells.bbox.y.size - outer.y.size, cells.bbox.x.size - outer.x.size) == (192 - 180, 192 - 190)


def test_exposure_becomes_a_warp(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> None:
    exposure = make_exposure(sky_map, VISITS[0])
    grid = geometry.patch.cells
    x, y = grid.bbox.x.start + 7, grid.bbox.y.start + 31
    exposure.mask[lsst.geom.Point2I(x, y)] = exposure.mask.getPlaneBitMask(["CR", "INTRP"])
    warp = warp_from_exposure(exposure, data_id(VISITS[0]), geometry)
    assert warp.bbox == grid.bbox
    inside = exposure[grid.bbox.to_legacy()]
    np.testing.assert_array_equal(warp.image, inside.image.array)
    np.testing.assert_array_equal(warp.variance, inside.variance.array)
    for plane in ("CR", "INTRP"):
        assert np.argwhere(warp.mask.get(plane)).tolist() == [[31, 7]]
    assert warp.has_psf.all()
    psf = exposure.getPsf().computeKernelImage(lsst.geom.Point2D(x, y))
    size = warp.psf_stamps.shape[-1]
    height, width = psf.array.shape
    assert size >= max(height, width)
    np.testing.assert_allclose(warp.psf_stamps[1, 1].max(), psf.array.max() / psf.array.sum(), rtol=2e-3)
    assert set(warp.detectors) == {LEFT, RIGHT}
    middle = (exposure.getBBox().beginX + exposure.getBBox().endX) // 2
    assert warp.detectors[LEFT].contains(x=middle - 2, y=y)
    assert warp.detectors[RIGHT].contains(x=middle + 2, y=y)
    assert not warp.detectors[LEFT].contains(x=middle + 2, y=y)
    np.testing.assert_allclose(warp.aperture_corrections["base_PsfFlux_instFlux"], CORRECTION)


def test_photometric_calibration_is_applied(
    sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry, warps: list[Warp]
) -> None:
    counts = warp_from_exposure(make_exposure(sky_map, VISITS[0], scale=2.5), data_id(VISITS[0]), geometry)
    np.testing.assert_allclose(counts.image, warps[0].image, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(counts.variance, warps[0].variance, rtol=1e-4)


def test_cells_in_which_the_psf_is_not_defined_are_missing(warps: list[Warp]) -> None:
    """Visit 904 has no detector on the right half; the middle of the patch lies in the third column."""
    has_psf = warps[-1].has_psf
    assert has_psf[:, :2].all()
    assert not has_psf[:, 3:].any()
    assert set(warps[-1].detectors) == {LEFT}


def test_companions(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> None:
    exposure = make_exposure(sky_map, VISITS[0])
    patch_box = sky_map[0][PATCH].getOuterBBox()
    lsst.afw.image.Mask.addMaskPlane("CLIPPED")
    artifacts = lsst.afw.image.Mask(patch_box)
    grid = geometry.patch.cells
    first = lsst.geom.Point2I(grid.bbox.x.start, grid.bbox.y.start)
    artifacts[first + lsst.geom.Extent2I(20, 10)] = artifacts.getPlaneBitMask("CLIPPED")
    fraction = lsst.afw.image.ImageF(exposure.getBBox())
    fraction[first + lsst.geom.Extent2I(4, 2)] = 0.6
    noise = lsst.afw.image.MaskedImageF(exposure.getBBox())
    noise.image.array[:, :] = np.random.default_rng(1).normal(size=noise.image.array.shape)
    warp = warp_from_exposure(
        exposure,
        data_id(VISITS[0]),
        geometry,
        artifact_mask=artifacts,
        masked_fraction=fraction,
        max_masked_fraction=0.5,
        noise=[noise],
    )
    assert np.argwhere(warp.mask.get("CLIPPED")).tolist() == [[10, 20]]
    assert np.argwhere(warp.mask.get("BAD")).tolist() == [[2, 4]]
    np.testing.assert_array_equal(warp.noise[0], noise.image[grid.bbox.to_legacy()].array)


def test_exposure_without_calibration_or_psf_is_refused(
    sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry
) -> None:
    exposure = make_exposure(sky_map, VISITS[0])
    exposure.setPsf(None)
    with pytest.raises(InvalidWarpError, match="Cam visit 901: it has no PSF"):
        warp_from_exposure(exposure, data_id(VISITS[0]), geometry)
    exposure.getMetadata()["BUNIT"] = "adu"
    with pytest.raises(InvalidWarpError, match="its pixels are in adu, and no calibration"):
        warp_from_exposure(exposure, data_id(VISITS[0]), geometry)
    exposure.setPhotoCalib(None)
    with pytest.raises(InvalidWarpError, match="no photometric calibration"):
        warp_from_exposure(exposure, data_id(VISITS[0]), geometry)


def check_exposure(exposure: lsst.afw.image.ExposureF, geometry: PatchGeometry) -> None:
    """Check that an exposure has what the measurement tasks ask for, and measure the stars on it."""
    grid = geometry.patch.cells
    assert exposure.getBBox() == grid.bbox.to_legacy()
    assert exposure.getFilter().bandLabel == "r"
    assert exposure.getPhotoCalib().getCalibrationMean() == 1.0
    assert {"NO_DATA", "SAT", "CR", "INEXACT_PSF", "PRIOR_CARRIED"} <= set(exposure.mask.getMaskPlaneDict())
    for point in (grid.bbox.to_legacy().getCenter(), exposure.getBBox().getMin()):
        position = lsst.geom.Point2D(point)
        psf = exposure.getPsf()
        np.testing.assert_allclose(psf.computeKernelImage(position).array.sum(), 1.0, rtol=1e-3)
        np.testing.assert_allclose(psf.computeImage(position).array.sum(), 1.0, rtol=1e-2)
        assert 0.7 < psf.computeShape(position).getDeterminantRadius() < 0.95

    schema = lsst.afw.table.SourceTable.makeMinimalSchema()
    detect = lsst.meas.algorithms.SourceDetectionTask.ConfigClass()
    detect.reEstimateBackground = False
    detect.thresholdValue = 50.0
    detection = lsst.meas.algorithms.SourceDetectionTask(schema=schema, config=detect)
    measure = lsst.meas.base.SingleFrameMeasurementTask.ConfigClass()
    measure.plugins.names = [
        "base_SdssCentroid",
        "base_SdssShape",
        "base_PsfFlux",
        "base_PixelFlags",
        "base_CircularApertureFlux",
    ]
    measure.slots.gaussianFlux = measure.slots.modelFlux = measure.slots.calibFlux = None
    measure.slots.apFlux = None
    measurement = lsst.meas.base.SingleFrameMeasurementTask(schema=schema, config=measure)
    table = lsst.afw.table.SourceTable.make(schema)
    sources = detection.run(table, exposure).sources
    measurement.run(sources, exposure)
    catalog = sources.copy(deep=True).asAstropy()
    box = lsst.geom.Box2I(grid.bbox.to_legacy())
    for x, y, flux in star_positions_in(geometry, box):
        distance = np.hypot(catalog["base_SdssCentroid_x"] - x, catalog["base_SdssCentroid_y"] - y)
        nearest = int(np.nanargmin(distance))
        assert distance[nearest] < 0.3
        assert catalog["base_PsfFlux_instFlux"][nearest] == pytest.approx(flux / CORRECTION, rel=0.08)


def star_positions_in(geometry: PatchGeometry, box: lsst.geom.Box2I) -> list[tuple[float, float, float]]:
    """Return the stars, which are placed by fractions of the outer box, with its border of 5 pixels."""
    box.grow(5)
    return star_positions(box)


def test_restored_coadd_as_exposure(restored: Struct, geometry: PatchGeometry) -> None:
    assert set(restored.coadd.provenance.inputs["visit"]) == set(VISITS)
    assert set(restored.coadd.provenance.inputs["detector"]) == {LEFT, RIGHT}
    check_exposure(restored.coadd.to_legacy(), geometry)


def test_restored_coadd_with_inputs_and_aperture_corrections(
    restored: Struct, geometry: PatchGeometry
) -> None:
    stitched = restored.coadd.to_legacy_cell_coadd().stitch()
    center = lsst.geom.Point2D(geometry.patch.cells.bbox.to_legacy().getCenter())
    correction = stitched.ap_corr_map["base_PsfFlux_instFlux"]
    assert correction.evaluate(center) == pytest.approx(CORRECTION)
    visits = {int(one.visit) for one in stitched.ccds.subsetContaining(center)}
    assert set(VISITS[:3]) <= visits
    exposure = to_exposure(restored.coadd)
    assert {int(record["visit"]) for record in exposure.getInfo().getCoaddInputs().visits} == set(VISITS)
    field = exposure.getInfo().getApCorrMap()["base_PsfFlux_instFlux"]
    assert field.evaluate(center) == pytest.approx(CORRECTION, rel=1e-6)
    check_exposure(exposure, geometry)


def test_restored_coadd_for_the_deblender(restored: Struct, sky_map: lsst.skymap.BaseSkyMap) -> None:
    coadd = make_exposure(sky_map, VISITS[0])
    variance, psf = coadd.variance.array.copy(), coadd.getPsf()
    task = DeconvolveWithDeepPriorTask(config=DeconvolveWithDeepPriorTask.ConfigClass(use_footprints=False))
    deconvolved = task.run(coadd=coadd, restored=restored.coadd).deconvolved
    assert isinstance(deconvolved, lsst.afw.image.ExposureF)
    assert np.isfinite(deconvolved.image.array).all()
    assert deconvolved.image.array.min() == 0.0
    np.testing.assert_array_equal(deconvolved.variance.array, variance)
    assert deconvolved.getPsf() == psf
    inside = deconvolved.image[restored.coadd.bbox.to_legacy()].array
    np.testing.assert_allclose(inside, np.nan_to_num(restored.coadd.image.array).clip(min=0.0))


@pytest.fixture
def repo(tmp_path: Path, sky_map: lsst.skymap.BaseSkyMap) -> Path:
    """A repository with the sky map, four direct warps and their masks, and a selection of three visits."""
    path = tmp_path / "repo"
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
    patch = {"skymap": "test", "tract": 0, "patch": PATCH}
    of_warp = ("skymap", "tract", "patch", "instrument", "visit")
    of_selection = ("instrument", "skymap", "tract", "patch", "band")
    for name, dimensions, storage_class in (
        ("direct_warp", of_warp, "ExposureF"),
        ("compare_warp_artifact_mask", of_warp, "Mask"),
        ("deep_coadd_visit_selection", of_selection, "StructuredDataDict"),
    ):
        registry.registerDatasetType(DatasetType(name, dimensions, storage_class, universe=butler.dimensions))
    for visit in VISITS:
        exposure = make_exposure(sky_map, visit)
        butler.put(exposure, "direct_warp", patch, instrument="Cam", visit=visit)
        inside = exposure.mask[sky_map[0][PATCH].getOuterBBox()]
        butler.put(inside, "compare_warp_artifact_mask", patch, instrument="Cam", visit=visit)
    selection = dict.fromkeys(VISITS[1:], True)
    butler.put(selection, "deep_coadd_visit_selection", patch, instrument="Cam", band="r")
    return path


def test_pipetask(repo: Path, geometry: PatchGeometry) -> None:
    """Direct warps from a Butler, and the restored coadd read back from it as an exposure."""
    result = pipetask(
        *("run", "-b", repo, "-i", "warps,skymaps", "-o", "u/test/run", "--register-dataset-types"),
        *("-p", "$COADD_DEEPPRIOR_DIR/pipelines/DRP-deepPrior.yaml#catalogue"),
        *QUICK,
        *("-c", "deepPriorCoadd:base_steps=240", "-c", "deepPriorCoadd:init=scratch"),
        *("-c", "deepPriorCoadd:steps=0", "-c", "deepPriorCoadd:target_fwhm_pixels=2.0"),
    )
    assert result.returncode == 0, result.stdout
    butler = Butler.from_config(repo, collections="u/test/run")
    patch = {"skymap": "test", "tract": 0, "patch": PATCH, "band": "r"}
    coadd = butler.get("deep_prior_coadd", patch)
    assert set(coadd.provenance.inputs["visit"]) == set(VISITS[1:])
    check_exposure(butler.get("deep_prior_coadd", patch, storageClass="ExposureF"), geometry)
    cells: Any = butler.get("deep_prior_coadd", patch, storageClass="MultipleCellCoadd")
    assert cells.stitch().asExposure().getInfo().getCoaddInputs() is not None
