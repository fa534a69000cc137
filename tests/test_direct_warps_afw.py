# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Direct warps in and exposures out, with real objects of the Science Pipelines; skipped without them."""

from __future__ import annotations

import os
import subprocess
import sys
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
from astropy.table import Table
from run_pipetask import QUICK, pipetask

import lsst.afw.detection
import lsst.afw.geom
import lsst.afw.image
import lsst.afw.math
import lsst.afw.table
import lsst.geom
import lsst.meas.algorithms
import lsst.meas.base
import lsst.pex.exceptions
import lsst.pipe.base.testUtils
import lsst.skymap
from lsst.coadd.deepprior.direct_warps import PatchGeometry, patch_from_skymap, warp_from_exposure
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.finer_skymap_dataset import register_finer_skymap
from lsst.coadd.deepprior.tasks.deconvolve_with_deep_prior import DeconvolveWithDeepPriorTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.warps import InvalidWarpError, Warp
from lsst.daf.butler import Butler, DatasetType, Timespan
from lsst.images import Box
from lsst.images.cells import CellCoadd
from lsst.pipe.base import Struct

PATCH = 4  # in the second row of patches, so that its pixels do not start at (0, 0)
NOISE = 10.0  # nJy in a pixel
STARS = ((0.3, 0.4, 60000.0), (0.7, 0.3, 30000.0), (0.45, 0.75, 45000.0))
"""Positions x, y as fractions of the patch, and fluxes in nJy."""
PATCH_ID = {"skymap": "test", "tract": 0, "patch": PATCH}
ROOT = Path(__file__).parents[1]
PIPELINE = "$COADD_DEEPPRIOR_DIR/pipelines/DRP-deepPrior.yaml"
RUN = "u/test/run"
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
    assert (geometry.patch.index.x, geometry.patch.index.y) == tuple(patch_info.getIndex())
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
    assert cells.bbox == outer
    assert tuple(cells.cell_shape) == (60, 38)


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


def detect(exposure: lsst.afw.image.ExposureF) -> lsst.afw.table.SourceCatalog:
    schema = lsst.afw.table.SourceTable.makeMinimalSchema()
    return detection_task(schema).run(lsst.afw.table.SourceTable.make(schema), exposure).sources


def detection_task(schema: lsst.afw.table.Schema) -> lsst.meas.algorithms.SourceDetectionTask:
    config = lsst.meas.algorithms.SourceDetectionTask.ConfigClass()
    config.reEstimateBackground = False
    config.thresholdValue = 50.0
    return lsst.meas.algorithms.SourceDetectionTask(schema=schema, config=config)


def measure(exposure: lsst.afw.image.ExposureF, apply_corrections: bool = False) -> Table:
    """Detect sources and measure them as single-frame measurement does, and correct fluxes if asked to."""
    schema = lsst.afw.table.SourceTable.makeMinimalSchema()
    detection = detection_task(schema)
    config = lsst.meas.base.SingleFrameMeasurementTask.ConfigClass()
    config.plugins.names = [
        "base_SdssCentroid",
        "base_SdssShape",
        "base_PsfFlux",
        "base_PixelFlags",
        "base_CircularApertureFlux",
    ]
    config.slots.gaussianFlux = config.slots.modelFlux = config.slots.calibFlux = None
    config.slots.apFlux = None
    measurement = lsst.meas.base.SingleFrameMeasurementTask(schema=schema, config=config)
    correction = lsst.meas.base.ApplyApCorrTask(schema=schema) if apply_corrections else None
    sources = detection.run(lsst.afw.table.SourceTable.make(schema), exposure).sources
    measurement.run(sources, exposure)
    if correction is not None:
        correction.run(sources, exposure.getInfo().getApCorrMap())
    return sources.copy(deep=True).asAstropy()


def find_stars(catalog: Table, stars: list[tuple[float, float, float]]) -> list[int]:
    """Check that stars are found where they are, and return their rows.

    The bound is five standard deviations of the position in a single visit, with the widest of the PSFs and
    noise that is limited by the background.
    """
    width, rows = 2.0, []
    for x, y, flux in stars:
        distance = np.hypot(catalog["base_SdssCentroid_x"] - x, catalog["base_SdssCentroid_y"] - y)
        rows.append(int(np.nanargmin(distance)))
        snr = flux / CORRECTION / (NOISE * np.sqrt(4.0 * np.pi) * width)
        assert distance[rows[-1]] < 5.0 * np.sqrt(2.0) * width / snr
    return rows


def check_stars(catalog: Table, stars: list[tuple[float, float, float]], correction: float) -> None:
    """Check that stars are found where they are, with their flux divided by a correction.

    The bound of the flux lets the restored star be wider than the target PSF by 3 %, which lowers its PSF
    flux by as much.
    """
    for row, (_, _, flux) in zip(find_stars(catalog, stars), stars, strict=True):
        assert catalog["base_PsfFlux_instFlux"][row] == pytest.approx(flux / correction, rel=0.03)


def check_exposure(exposure: lsst.afw.image.ExposureF, coadd: CellCoadd) -> None:
    """Check that an exposure has the pixels of a coadd of which each cell is covered, and its components."""
    bbox = coadd.bbox.to_legacy()
    assert exposure.getBBox() == bbox
    np.testing.assert_array_equal(exposure.image.array, coadd.image.array)
    np.testing.assert_array_equal(exposure.variance.array, coadd.variance.array)
    for plane in ("NO_DATA", "SAT", "CR", "REJECTED", "INEXACT_PSF", "FEW_VISITS", "PRIOR_CARRIED"):
        bit = exposure.mask.getPlaneBitMask(plane)
        np.testing.assert_array_equal(exposure.mask.array & bit != 0, coadd.mask.get(plane))
    assert exposure.getFilter().bandLabel == "r"
    assert exposure.getPhotoCalib().getCalibrationMean() == 1.0
    center = lsst.geom.Point2D(bbox.getCenter())
    sky = exposure.getWcs().pixelToSky(center)
    expected = coadd.sky_projection.pixel_to_sky(x=center.x, y=center.y)
    np.testing.assert_allclose(sky.getRa().asDegrees(), expected.ra.deg, rtol=0.0, atol=1e-9)
    np.testing.assert_allclose(sky.getDec().asDegrees(), expected.dec.deg, rtol=0.0, atol=1e-9)
    psf = exposure.getPsf()
    target = lsst.meas.algorithms.SingleGaussianPsf(25, 25, 2.0 / np.sqrt(8.0 * np.log(2.0)))
    radius = target.computeShape(lsst.geom.Point2D(0.0, 0.0)).getDeterminantRadius()
    for cell in coadd.bounds.cell_indices():
        box = lsst.geom.Box2D(coadd.grid.bbox_of(cell).to_legacy())
        upper = lsst.geom.Point2D(np.nextafter(box.getMaxX(), -np.inf), np.nextafter(box.getMaxY(), -np.inf))
        for position in (box.getMin(), box.getCenter(), upper):
            assert psf.computeKernelImage(position).array.sum() == pytest.approx(1.0, abs=1e-6)
            # Shifted by half a pixel, it is no longer sampled well; what it loses is 0.3 %.
            assert psf.computeImage(position).array.sum() == pytest.approx(1.0, abs=0.01)
            assert psf.computeShape(position).getDeterminantRadius() == pytest.approx(radius, rel=0.01)
    with pytest.raises(lsst.pex.exceptions.InvalidParameterError):
        psf.computeKernelImage(lsst.geom.Box2D(bbox).getMax() + lsst.geom.Extent2D(1.0, 1.0))


def stars_of(sky_map: lsst.skymap.BaseSkyMap) -> list[tuple[float, float, float]]:
    return star_positions(sky_map[0][PATCH].getOuterBBox())


def test_restored_coadd_as_exposure(restored: Struct, sky_map: lsst.skymap.BaseSkyMap) -> None:
    assert set(restored.coadd.provenance.inputs["visit"]) == set(VISITS)
    assert set(restored.coadd.provenance.inputs["detector"]) == {LEFT, RIGHT}
    exposure = restored.coadd.to_legacy()
    check_exposure(exposure, restored.coadd)
    check_stars(measure(exposure), stars_of(sky_map), CORRECTION)


def test_restored_coadd_with_inputs_and_aperture_corrections(
    restored: Struct, geometry: PatchGeometry, sky_map: lsst.skymap.BaseSkyMap
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
    check_exposure(exposure, restored.coadd)
    check_stars(measure(exposure, apply_corrections=True), stars_of(sky_map), 1.0)


def test_cells_without_visit(warps: list[Warp], sky_map: lsst.skymap.BaseSkyMap) -> None:
    """Visit 904 alone covers the left half only; the rest has no data, and no PSF."""
    config = DeepPriorCoaddTask.ConfigClass(target_fwhm_pixels=2.0)
    config.update(init="scratch", base_steps=240, steps=0, n_variance_draws=1, device="cpu")
    coadd = DeepPriorCoaddTask(config=config).run(warps=warps[-1:]).coadd
    for exposure in (coadd.to_legacy(), to_exposure(coadd)):
        box = lsst.geom.Box2D(exposure.getBBox())
        y = box.getCenterY()
        assert exposure.getPsf().computeShape(lsst.geom.Point2D(box.getMinX(), y)).getArea() > 0.0
        with pytest.raises(lsst.pex.exceptions.InvalidParameterError):
            exposure.getPsf().computeKernelImage(lsst.geom.Point2D(box.getMaxX() - 1.0, y))
        no_data = exposure.mask.array & exposure.mask.getPlaneBitMask("NO_DATA") != 0
        assert no_data[:, -80:].all()
        assert not no_data[:, :80].any()
        left = [star for star in stars_of(sky_map) if star[0] < box.getCenterX() - 20.0]
        assert len(left) == 1
        check_stars(measure(exposure), left, CORRECTION)


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


def test_warp_smaller_than_the_patch(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> None:
    exposure = make_exposure(sky_map, VISITS[0])
    bbox = geometry.patch.cells.bbox
    box = Box.factory[bbox.y.start + 33 : bbox.y.stop + 9, bbox.x.start - 5 : bbox.x.stop - 21]
    warp = warp_from_exposure(exposure[box.to_legacy()], data_id(VISITS[0]), geometry)
    expected = Box.factory[bbox.y.start + 33 : bbox.y.stop, bbox.x.start : bbox.x.stop - 21]
    assert warp.bbox == expected
    np.testing.assert_array_equal(warp.image, exposure.image[expected.to_legacy()].array)
    far = lsst.geom.Box2I(exposure.getBBox().getMin(), lsst.geom.Extent2I(8, 8))
    with pytest.raises(InvalidWarpError, match="no pixel in common with patch 4"):
        warp_from_exposure(exposure[far], data_id(VISITS[0]), geometry)


def test_other_psfs(sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry) -> None:
    """A PSF that is defined everywhere, and one of an even size, as kernels may have."""
    exposure = make_exposure(sky_map, VISITS[-1])
    exposure.setPsf(lsst.meas.algorithms.SingleGaussianPsf(31, 29, 1.5))
    warp = warp_from_exposure(exposure, data_id(VISITS[-1]), geometry)
    assert warp.has_psf.all()
    assert warp.psf_stamps.shape[-2:] == (31, 31)
    y, x = np.mgrid[-15:16, -15:16]
    gaussian = np.exp(-(x**2 + y**2) / (2.0 * 1.5**2))
    gaussian[[0, -1]] = 0.0
    np.testing.assert_allclose(warp.psf_stamps[0, 4], gaussian / gaussian.sum(), rtol=0.0, atol=1e-7)


def test_psf_is_that_at_the_centers_of_the_cells(
    sky_map: lsst.skymap.BaseSkyMap, geometry: PatchGeometry
) -> None:
    exposure = make_exposure(sky_map, VISITS[0])
    detectors = exposure.getInfo().getCoaddInputs().ccds
    detectors[1].setPsf(lsst.meas.algorithms.SingleGaussianPsf(25, 25, 2.4))
    exposure.setPsf(lsst.meas.algorithms.CoaddPsf(detectors, exposure.getWcs()))
    stamps = warp_from_exposure(exposure, data_id(VISITS[0]), geometry).psf_stamps
    size = stamps.shape[-1]
    whole = lsst.geom.Box2I(lsst.geom.Point2I(-(size // 2), -(size // 2)), lsst.geom.Extent2I(size, size))
    for cell in sky_map[0][PATCH]:
        expected = lsst.afw.image.ImageD(whole)
        center = lsst.geom.Box2D(cell.inner_bbox).getCenter()
        kernel = exposure.getPsf().computeKernelImage(center)
        expected[kernel.getBBox()] = kernel
        inner = geometry.patch.cells.index_of(y=cell.inner_bbox.beginY, x=cell.inner_bbox.beginX)
        np.testing.assert_allclose(
            stamps[inner.i, inner.j], expected.array / expected.array.sum(), rtol=0.0, atol=1e-7
        )
    peaks = stamps.max(axis=(2, 3))
    assert (peaks[:, :2] > 1.5 * peaks[:, 3:]).all()


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
