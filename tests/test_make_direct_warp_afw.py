# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Detector images, warped by the task of Data Release Production, restored; skipped without drp_tasks."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lsst.drp.tasks.make_direct_warp")

from afw_scene import (
    CORRECTION,
    LEFT,
    NOISE,
    PATCH,
    RIGHT,
    VISITS,
    check_exposure,
    check_stars,
    data_id,
    make_sky_map,
    measure,
    stars_of,
)

import lsst.afw.cameraGeom.testUtils
import lsst.afw.geom
import lsst.afw.image
import lsst.afw.math
import lsst.geom
import lsst.meas.algorithms
import lsst.skymap
from lsst.coadd.deepprior.direct_warps import patch_from_skymap, warp_from_exposure
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.daf.butler import DataCoordinate, DimensionUniverse
from lsst.drp.tasks.make_direct_warp import MakeDirectWarpTask, WarpDetectorInputs
from lsst.pipe.base import Struct
from lsst.pipe.tasks.coaddBase import makeSkyInfo

SCALE = 2.5
"""What carries counts of the detectors to nJy."""
SIZE = lsst.geom.Extent2I(150, 320)
"""Of a detector; two of them, turned against the tract, cover the patch but for the gap between them."""


def detector_id(visit: int, detector: int) -> DataCoordinate:
    """Make a data ID with all that names of a detector image are made of."""
    universe = DimensionUniverse()
    records = {
        "instrument": universe["instrument"].RecordClass(
            name="Cam", class_name="lsst.obs.base.instrument_tests.DummyCam", detector_max=20, visit_max=1000
        ),
        "visit": universe["visit"].RecordClass(id=visit, instrument="Cam"),
        "detector": universe["detector"].RecordClass(id=detector, instrument="Cam"),
        "physical_filter": universe["physical_filter"].RecordClass(name="r_1", instrument="Cam", band="r"),
        "band": universe["band"].RecordClass(name="r"),
        "day_obs": universe["day_obs"].RecordClass(id=20250102, instrument="Cam"),
    }
    values = {"instrument": "Cam", "visit": visit, "detector": detector, "physical_filter": "r_1"}
    identity = DataCoordinate.standardize(values | {"band": "r", "day_obs": 20250102}, universe=universe)
    return identity.expanded(records)


def make_detector_image(
    sky_map: lsst.skymap.BaseSkyMap, visit: int, detector: int
) -> lsst.afw.image.ExposureF:
    """Make the image of one detector in counts, with stars as seen by the PSF of its visit."""
    tract_wcs = sky_map[0].getWcs()
    center = tract_wcs.pixelToSky(lsst.geom.Point2D(sky_map[0][PATCH].getOuterBBox().getCenter()))
    number = VISITS.index(visit)
    # The middle of the patch lies in the gap of 4 pixels between the detectors, less a dither.
    x = SIZE.x + 2.0 if detector == LEFT else -2.0
    middle = lsst.geom.Point2D(x + 7.0 * number, SIZE.y / 2.0 - 3.3 * number)
    angle = (10.0 + 15.0 * number) * lsst.geom.degrees
    matrix = lsst.afw.geom.makeCdMatrix(0.2 * lsst.geom.arcseconds, angle)
    wcs = lsst.afw.geom.makeSkyWcs(middle, center, matrix)
    exposure = lsst.afw.image.ExposureF(lsst.geom.Box2I(lsst.geom.Point2I(0, 0), SIZE), wcs)
    rng = np.random.default_rng([visit, detector])
    exposure.image.array[:, :] = rng.normal(scale=NOISE / SCALE, size=exposure.image.array.shape)
    exposure.variance.array[:, :] = (NOISE / SCALE) ** 2
    psf = lsst.meas.algorithms.SingleGaussianPsf(25, 25, 1.7 + 0.1 * number)
    box = exposure.getBBox()
    for x, y, flux in stars_of(sky_map):
        stamp = psf.computeImage(wcs.skyToPixel(tract_wcs.pixelToSky(lsst.geom.Point2D(x, y))))
        if stamp.getBBox().overlaps(box):
            common = stamp.getBBox().clippedTo(box)
            exposure.image[common].array[:, :] += flux / CORRECTION / SCALE * stamp[common].array
    exposure.setPsf(psf)
    exposure.setPhotoCalib(lsst.afw.image.PhotoCalib(SCALE))
    exposure.setFilter(lsst.afw.image.FilterLabel(band="r", physical="r_1"))
    exposure.setDetector(
        lsst.afw.cameraGeom.testUtils.DetectorWrapper(name=str(detector), id=detector).detector
    )
    corrections = lsst.afw.image.ApCorrMap()
    for name, value in (("base_PsfFlux_instFlux", CORRECTION), ("base_PsfFlux_instFluxErr", 0.0)):
        corrections[name] = lsst.afw.math.ChebyshevBoundedField(box, np.array([[value]]))
    exposure.getInfo().setApCorrMap(corrections)
    return exposure


def make_direct_warp(sky_map: lsst.skymap.BaseSkyMap, visit: int) -> Struct:
    """Warp the detectors of a visit, with a noise realisation and fractions of masked pixels."""
    config = MakeDirectWarpTask.ConfigClass(border=20, numberOfNoiseRealizations=1)
    config.update(doSelectPreWarp=False, useVisitSummaryPsf=False)
    inputs = {
        detector: WarpDetectorInputs(
            make_detector_image(sky_map, visit, detector), detector_id(visit, detector)
        )
        for detector in (LEFT, RIGHT)
    }
    task = MakeDirectWarpTask(config=config)
    return task.run(inputs, sky_info=makeSkyInfo(sky_map, 0, PATCH), visit_summary=None)


def test_warps_of_the_production() -> None:
    sky_map = make_sky_map(cells=True)
    geometry = patch_from_skymap(sky_map, "test", 0, PATCH, 150)
    warps = []
    for visit in VISITS:
        made = make_direct_warp(sky_map, visit)
        warp = warp_from_exposure(
            made.warp,
            data_id(visit),
            geometry,
            masked_fraction=made.masked_fraction_warp,
            max_masked_fraction=0.5,
            noise=[made.noise_warp0],
        )
        assert warp.bbox == geometry.patch.cells.bbox
        assert set(warp.detectors) == {LEFT, RIGHT}
        warps.append(warp)
    config = DeepPriorCoaddTask.ConfigClass(target_fwhm_pixels=2.0)
    config.update(init="scratch", base_steps=240, steps=0, n_variance_draws=1, device="cpu")
    coadd = DeepPriorCoaddTask(config=config).run(warps=warps).coadd
    exposure = to_exposure(coadd)
    check_exposure(exposure, coadd)
    check_stars(measure(exposure, apply_corrections=True), stars_of(sky_map), 1.0)
