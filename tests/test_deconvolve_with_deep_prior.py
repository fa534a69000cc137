# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The pixels that the deblender reads; what is an ExposureF around them is in `test_direct_warps_afw`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import erf

import lsst.pipe.base.testUtils
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA
from lsst.coadd.deepprior.tasks.deconvolve_with_deep_prior import (
    MODEL_FWHM,
    DeconvolveWithDeepPriorConfig,
    DeconvolveWithDeepPriorConnections,
    DeconvolveWithDeepPriorTask,
    deconvolved_pixels,
)
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.warps import Warp
from lsst.images import Box
from lsst.images.cells import CellCoadd


def restore(warps: list[Warp], target_fwhm: float) -> CellCoadd:
    config = DeepPriorCoaddTask.ConfigClass(target_fwhm_pixels=target_fwhm)
    config.update(init="scratch", base_steps=20, steps=0, n_variance_draws=1, device="cpu")
    return DeepPriorCoaddTask(config=config).run(warps=warps).coadd


@pytest.fixture(scope="module")
def restored(warps: list[Warp]) -> CellCoadd:
    """A restored image of 80x108 pixels, with a negative pixel and a cell that is missing."""
    coadd = restore(warps, MODEL_FWHM)
    coadd.image.array[3, 4] = -5.0
    coadd.image.array[40:, 72:] = np.nan
    return coadd


def test_connections() -> None:
    lsst.pipe.base.testUtils.lintConnections(DeconvolveWithDeepPriorConnections)
    config = DeconvolveWithDeepPriorConfig()
    assert DeconvolveWithDeepPriorConnections(config=config).inputs == {"coadd", "restored", "catalog"}
    config.use_footprints = False
    assert DeconvolveWithDeepPriorConnections(config=config).inputs == {"coadd", "restored"}


def test_target_is_the_gaussian_nearest_to_the_model_psf() -> None:
    """The deblender's model PSF is a Gaussian of sigma 0.8 pixel integrated over pixels."""
    x = np.arange(-8, 9)
    profile = 0.5 * (erf((x + 0.5) / (0.8 * np.sqrt(2))) - erf((x - 0.5) / (0.8 * np.sqrt(2))))
    model = np.outer(profile, profile)

    def distance(fwhm: float) -> float:
        profile = np.exp(-0.5 * (x * FWHM_PER_SIGMA / fwhm) ** 2)
        stamp = np.outer(profile, profile) / profile.sum() ** 2
        return float(np.linalg.norm(stamp - model) / np.linalg.norm(model))

    assert distance(MODEL_FWHM) < 0.006
    assert min(distance(MODEL_FWHM - 0.05), distance(MODEL_FWHM + 0.05)) > 0.02


def test_pixels_lie_at_their_place_and_are_finite_and_not_negative(restored: CellCoadd) -> None:
    """The coadd starts 10 rows above and 6 columns left of the restored image, and ends inside of it."""
    start = restored.bbox.start
    bbox = Box.factory[start.y + 10 : start.y + 75, start.x - 6 : start.x + 100]
    image = deconvolved_pixels(restored, bbox)
    assert image.shape == (65, 106)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[:, :6], 0.0)
    np.testing.assert_array_equal(image[30:, 78:], 0.0)
    np.testing.assert_array_equal(image[:30, 6:], restored.image.array[10:40, :100].clip(min=0.0))
    assert image.max() > 0.0
    assert restored.image.array[3, 4] == -5.0
    assert deconvolved_pixels(restored, restored.bbox)[3, 4] == 0.0


def test_light_outside_of_the_detections_is_left_out(restored: CellCoadd) -> None:
    footprints = np.zeros((80, 108), dtype=np.int32)
    footprints[20:30, 5:50] = 7
    image = deconvolved_pixels(restored, restored.bbox, footprints)
    whole = deconvolved_pixels(restored, restored.bbox)
    np.testing.assert_array_equal(image[20:30, 5:50], whole[20:30, 5:50])
    assert image.sum() == pytest.approx(whole[20:30, 5:50].sum())


def test_image_is_in_the_units_of_the_coadd(restored: CellCoadd) -> None:
    """In coadds of HSC one of them is 57.5 nJy."""
    ys, xs = (SimpleNamespace(begin=side.start, end=side.stop) for side in (restored.bbox.y, restored.bbox.x))
    coadd = SimpleNamespace(
        image=SimpleNamespace(array=np.zeros(tuple(restored.bbox.shape), dtype=np.float32)),
        getBBox=lambda: SimpleNamespace(y=ys, x=xs),
        getPhotoCalib=lambda: SimpleNamespace(getCalibrationMean=lambda: 57.5),
    )
    result = DeconvolveWithDeepPriorTask().run(coadd=coadd, restored=restored)
    image = deconvolved_pixels(restored, restored.bbox)
    np.testing.assert_allclose(57.5 * result.deconvolved.image.array, image, rtol=1e-6)
    coadd.getPhotoCalib = lambda: None
    with pytest.raises(RuntimeError, match="The coadd has no PhotoCalib"):
        DeconvolveWithDeepPriorTask().run(coadd=coadd, restored=restored)


def test_what_does_not_fit_is_refused(restored: CellCoadd, warps: list[Warp]) -> None:
    with pytest.raises(RuntimeError, match="have no pixel in common"):
        deconvolved_pixels(restored, Box.from_shape((10, 10)))
    wide = restore(warps, 2.5)
    with pytest.raises(RuntimeError, match=r"FWHM 2\.500 pixels.*target_fwhm_pixels = 2\.0"):
        deconvolved_pixels(wide, wide.bbox)
