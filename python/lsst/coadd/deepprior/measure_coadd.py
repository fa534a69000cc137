# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Model plus residual in one image, for measurement tasks that read one image only."""

from __future__ import annotations

__all__ = ("make_measure_coadd",)

import numpy as np

from lsst.images import Image
from lsst.images.cells import CellCoadd

from .plain_coadd import Coadd

_MATTERS = 3.0
"""Significance of the residual under the PSF from which its own, wider PSF matters."""


def make_measure_coadd(coadd: CellCoadd, residual: CellCoadd, plain: Coadd) -> CellCoadd:
    """Add the residual to a restored image.

    Its sources have the flux of the data. What the restored image holds of them has the target PSF, the rest
    the wider PSF of the plain coadd, whose noise the image has too.

    Parameters
    ----------
    coadd : `lsst.images.cells.CellCoadd`
        The restored image.
    residual : `lsst.images.cells.CellCoadd`
        Coadd of data minus model of the same patch.
    plain : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd of the same patch.

    Returns
    -------
    both : `lsst.images.cells.CellCoadd`
        The sum, with the target PSF. Its mask has the planes of both, and ``INEXACT_PSF`` where the residual
        matters or is missing; there, the image is the restored one. The variance is the sum of the
        variances; the noise realisations, which are added too, know of their correlation. The metadata are
        those of the restored image.

    Raises
    ------
    ValueError
        Raised if the two are not of one patch.
    """
    if coadd.bbox != residual.bbox or plain.shape != tuple(coadd.bbox.shape):
        raise ValueError(f"The restored image covers {coadd.bbox}, the residual {residual.bbox}.")
    layer = np.where(plain.good, residual.image.array, 0.0)
    scale = plain.matched / np.sqrt(np.maximum(plain.information, np.finfo(float).tiny))
    matters = np.abs(plain.correlate(plain.weight * layer, power=1)) > _MATTERS * scale
    mask = coadd.mask.copy()
    for name in mask.schema.names:
        mask.set(name, coadd.mask.get(name) | residual.mask.get(name))
    mask.set("INEXACT_PSF", mask.get("INEXACT_PSF") | matters | ~plain.good)
    variance = coadd.variance.array + np.where(plain.good, residual.variance.array, np.nan)

    def image(array: np.ndarray, like: Image) -> Image:
        return Image(array.astype(np.float32), bbox=coadd.bbox, unit=like.unit)

    both = CellCoadd(
        image(coadd.image.array + layer, coadd.image),
        mask=mask,
        variance=image(variance, coadd.variance),
        noise_realizations=[
            image(one.array + np.where(plain.good, other.array, np.nan), one)
            for one, other in zip(coadd.noise_realizations, residual.noise_realizations, strict=False)
        ],
        mask_fractions=dict(coadd.mask_fractions),
        sky_projection=coadd.sky_projection,
        band=coadd.band,
        psf=coadd.psf,
        aperture_corrections=dict(coadd.aperture_corrections),
        patch=coadd.patch,
        provenance=coadd.provenance,
    )
    both.metadata.update(coadd.metadata)
    return both
