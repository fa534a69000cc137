# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Direct warps in and exposures out, with real objects of the Science Pipelines; skipped without them."""

from __future__ import annotations

import numpy as np
import pytest
from afw_scene import (
    CORRECTION,
    LEFT,
    PATCH,
    RIGHT,
    VISITS,
    check_exposure,
    check_stars,
    data_id,
    make_exposure,
    make_sky_map,
    measure,
    stars_of,
)

import lsst.afw.image
import lsst.geom
import lsst.meas.algorithms
import lsst.pex.exceptions
import lsst.skymap
from lsst.coadd.deepprior.direct_warps import PatchGeometry, patch_from_skymap, warp_from_exposure
from lsst.coadd.deepprior.exposures import to_exposure
from lsst.coadd.deepprior.tasks.deconvolve_with_deep_prior import DeconvolveWithDeepPriorTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.warps import InvalidWarpError, Warp
from lsst.images import Box
from lsst.pipe.base import Struct


@pytest.fixture(scope="module")
def sky_map() -> lsst.skymap.BaseSkyMap:
    return make_sky_map(cells=True)


@pytest.fixture(scope="module")
def geometry(sky_map: lsst.skymap.BaseSkyMap) -> PatchGeometry:
    return patch_from_skymap(sky_map, "test", 0, PATCH, 150)


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
