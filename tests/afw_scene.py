# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Exposures, sky maps and checks with real objects of the Science Pipelines.

Tests that import them are skipped without these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table

pytest.importorskip("lsst.afw.image")
pytest.importorskip("lsst.cell_coadds")
pytest.importorskip("lsst.meas.algorithms")
pytest.importorskip("lsst.meas.base")
pytest.importorskip("lsst.skymap")

import lsst.afw.geom
import lsst.afw.image
import lsst.afw.math
import lsst.afw.table
import lsst.geom
import lsst.meas.algorithms
import lsst.meas.base
import lsst.pex.exceptions
import lsst.skymap
from lsst.images.cells import CellCoadd

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
