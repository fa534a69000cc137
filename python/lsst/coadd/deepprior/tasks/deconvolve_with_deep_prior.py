# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that gives the scarlet deblender a restored image in place of its own deconvolution."""

from __future__ import annotations

__all__ = (
    "DeconvolveWithDeepPriorConfig",
    "DeconvolveWithDeepPriorConnections",
    "DeconvolveWithDeepPriorTask",
    "deconvolved_pixels",
)

from typing import Any

import numpy as np

from lsst.images import Box, NoOverlapError
from lsst.images.cells import CellCoadd
from lsst.pex.config import Field
from lsst.pipe.base import PipelineTask, PipelineTaskConfig, PipelineTaskConnections, Struct
from lsst.pipe.base.connectionTypes import Input, Output

from ..psf import fwhm
from ..stack_imports import import_from_stack
from .geometry import psf_stamps

MODEL_FWHM = 2.0
"""FWHM in pixels of the sampled Gaussian nearest to the deblender's model PSF, which is a Gaussian of sigma
0.8 pixel integrated over the pixels; the two stamps differ by 0.5 % of their root sum of squares."""

_TOLERANCE = 0.02
"""Largest relative difference of a restored image's FWHM from `MODEL_FWHM`."""


class DeconvolveWithDeepPriorConnections(
    PipelineTaskConnections, dimensions=("tract", "patch", "band", "skymap")
):
    """Inputs and outputs of `DeconvolveWithDeepPriorTask`."""

    coadd = Input(
        doc="The coadd that is deblended; all but the pixels of the image is taken over from it.",
        name="deep_coadd",
        storageClass="ExposureF",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    restored = Input(
        doc="The restored image, with the model PSF of the deblender as its target PSF.",
        name="deep_prior_coadd",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    catalog = Input(
        doc="Detections merged over all bands, outside of which the image is set to zero.",
        name="object_detection_merged",
        storageClass="SourceCatalog",
        dimensions=("tract", "patch", "skymap"),
    )
    deconvolved = Output(
        doc="What the deblender takes for the deconvolved coadd.",
        name="deconvolved_deep_coadd",
        storageClass="ExposureF",
        dimensions=("tract", "patch", "band", "skymap"),
    )

    def __init__(self, *, config: DeconvolveWithDeepPriorConfig) -> None:
        if not config.use_footprints:
            del self.catalog


class DeconvolveWithDeepPriorConfig(
    PipelineTaskConfig, pipelineConnections=DeconvolveWithDeepPriorConnections
):
    """Configuration of `DeconvolveWithDeepPriorTask`."""

    use_footprints = Field[bool](
        doc="Whether light outside of the footprints of the merged detections is left out, as "
        "DeconvolveExposureTask does.",
        default=True,
    )


class DeconvolveWithDeepPriorTask(PipelineTask):
    """Write a restored image in the form in which DeconvolveExposureTask writes the deconvolved coadd.

    That form, in the release that it was written for, is an ``ExposureF`` on the box of the coadd with mask,
    variance and all other components of the coadd, and an image that is finite and not negative, at the model
    PSF of the deblender.
    """

    ConfigClass = DeconvolveWithDeepPriorConfig
    _DefaultName = "deconvolveWithDeepPrior"
    config: DeconvolveWithDeepPriorConfig

    def run(self, *, coadd: Any, restored: CellCoadd, catalog: Any = None) -> Struct:
        """Replace the image of a coadd by a restored one.

        Parameters
        ----------
        coadd : `lsst.afw.image.ExposureF`
            The coadd that is deblended; it is changed.
        restored : `lsst.images.cells.CellCoadd`
            The restored image of the same patch and band.
        catalog : `lsst.afw.table.SourceCatalog`, optional
            Merged detections.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            ``deconvolved`` (`lsst.afw.image.ExposureF`), in the units of the coadd.

        Raises
        ------
        RuntimeError
            Raised if the restored image has another PSF than the deblender's model, or no pixel in common
            with the coadd, or if the units of the coadd are not known.
        """
        bbox = Box.from_legacy(coadd.getBBox())
        footprints = None
        if catalog is not None:
            image = import_from_stack("lsst.afw.image").ImageI(coadd.getBBox())
            for record in catalog:
                # Sky objects are placed in the whole patch, and may reach beyond a coadd without its border.
                record.getFootprint().spans.clippedTo(coadd.getBBox()).setImage(image, 1)
            footprints = image.array
        coadd.image.array[:, :] = deconvolved_pixels(restored, bbox, footprints) / _nanojansky_per_unit(coadd)
        return Struct(deconvolved=coadd)


def _nanojansky_per_unit(coadd: Any) -> float:
    """Return what the pixels of an ``ExposureF`` are to be multiplied with for nJy."""
    if (photo_calib := coadd.getPhotoCalib()) is None:
        raise RuntimeError(
            "The coadd has no PhotoCalib, so that the restored image cannot be put into its units; name a "
            "calibrated coadd."
        )
    return float(photo_calib.getCalibrationMean())


def deconvolved_pixels(restored: CellCoadd, bbox: Box, footprints: np.ndarray | None = None) -> np.ndarray:
    """Return the pixels that the deblender is to take for the deconvolved coadd.

    Parameters
    ----------
    restored : `lsst.images.cells.CellCoadd`
        The restored image.
    bbox : `lsst.images.Box`
        Box of the coadd in tract pixels.
    footprints : `numpy.ndarray`, (y, x), optional
        True or positive where there is a detection.

    Returns
    -------
    image : `numpy.ndarray`, (y, x), float32
        The restored image in nJy, 0 where it is negative or not known, and outside of the detections.

    Raises
    ------
    RuntimeError
        Raised if the restored image has another PSF than the deblender's model, or no pixel in common with
        the coadd.
    """
    stamps = psf_stamps(restored)
    measured = fwhm(stamps[np.isfinite(stamps[:, :, 0, 0])][0])
    if abs(measured - MODEL_FWHM) > _TOLERANCE * MODEL_FWHM:
        raise RuntimeError(
            f"The restored image has a PSF of FWHM {measured:.3f} pixels, the deblender expects "
            f"{MODEL_FWHM}: restore it with target_fwhm_pixels = {MODEL_FWHM}."
        )
    try:
        box = bbox.intersection(restored.bbox)
    except NoOverlapError:
        raise RuntimeError(
            f"The coadd, {bbox}, and the restored image, {restored.bbox}, have no pixel in common."
        ) from None
    image = np.zeros(tuple(bbox.shape), dtype=np.float32)
    image[box.slice_within(bbox)] = np.nan_to_num(restored.image[box].array, nan=0.0).clip(min=0.0)
    if footprints is not None:
        image[~(np.asarray(footprints) > 0)] = 0.0
    return image
