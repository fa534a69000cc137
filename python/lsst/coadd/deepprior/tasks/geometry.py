# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""From the objects of lsst.images to plain numbers and arrays."""

from __future__ import annotations

__all__ = ("pixel_scale", "pixel_to_sky", "plain_coadd", "psf_stamps")

from collections.abc import Callable

import numpy as np

from lsst.images import XY, Box, SkyProjection
from lsst.images.cells import CellCoadd

from ..plain_coadd import Coadd
from ..psf import FWHM_PER_SIGMA, fwhm
from ..stamps import Stamp

_SKY = 0.2
"""Restored surface brightness, in units of the noise of the coadd, above which a pixel is no sky."""


def pixel_scale(sky_projection: SkyProjection, bbox: Box) -> float:
    """Measure the size of a pixel at the centre of a box.

    Parameters
    ----------
    sky_projection : `lsst.images.SkyProjection`
        Projection of the pixels to the sky.
    bbox : `lsst.images.Box`
        The box.

    Returns
    -------
    scale : `float`
        Root of the area of the pixel, in arcsec.
    """
    x, y = bbox.x.center, bbox.y.center
    corner, right, above = (
        sky_projection.pixel_to_sky(XY(x=x + dx, y=y + dy)) for dx, dy in ((0, 0), (1, 0), (0, 1))
    )
    return float(np.sqrt(corner.separation(right).arcsec * corner.separation(above).arcsec))


def pixel_to_sky(
    sky_projection: SkyProjection,
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a projection as a function of plain arrays.

    Parameters
    ----------
    sky_projection : `lsst.images.SkyProjection`
        Projection of the pixels to the sky.

    Returns
    -------
    project : `~collections.abc.Callable`
        Function of pixel positions x and y that returns right ascension and declination in degrees.
    """

    def project(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(x) == 0:  # the projection does not take empty arrays
            return np.zeros(0), np.zeros(0)
        sky = sky_projection.pixel_to_sky(XY(x=x, y=y))
        return sky.ra.deg, sky.dec.deg

    return project


def psf_stamps(coadd: CellCoadd) -> np.ndarray:
    """Collect the PSF of all cells of a coadd.

    Parameters
    ----------
    coadd : `lsst.images.cells.CellCoadd`
        Coadd of a whole patch.

    Returns
    -------
    stamps : `numpy.ndarray`, (cell_i, cell_j, k, k)
        PSF stamps; NaN in missing cells.
    """
    size = coadd.grid.grid_size
    stamps = np.full((size.i, size.j, *coadd.psf.kernel_bbox.shape), np.nan)
    for cell in coadd.psf.bounds.cell_indices():
        stamps[cell.i, cell.j] = coadd.psf[cell].array
    return stamps


def plain_coadd(coadd: CellCoadd, residual: CellCoadd) -> tuple[Coadd, float]:
    """Put the plain coadd together again from a restored patch.

    The correlation of its noise is measured on the first noise realisation, carried together like the image,
    or, without any, on the residual where the restored image shows no source.

    Parameters
    ----------
    coadd : `lsst.images.cells.CellCoadd`
        The restored image.
    residual : `lsst.images.cells.CellCoadd`
        Coadd of data minus model of the same patch.

    Returns
    -------
    plain : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd.
    target_sigma : `float`
        Sigma in pixels of the PSF of the restored image.
    """
    from ..noise_correlation import REACH, noise_correlation

    target = psf_stamps(coadd)
    sigma = fwhm(target[np.isfinite(target[:, :, 0, 0])][0]) / FWHM_PER_SIGMA
    model = np.nan_to_num(coadd.image.array)
    plain = Coadd(model, sigma, residual.image.array, residual.variance.array, psf_stamps(residual))
    where = plain.good.copy()
    if coadd.noise_realizations and residual.noise_realizations:
        noise = [np.nan_to_num(one.noise_realizations[0].array) for one in (coadd, residual)]
        deviation = plain.carry(Stamp(0, 0, noise[0])).array + noise[1]
    else:
        where &= model < _SKY * np.sqrt(plain.variance)
        deviation = np.where(where, residual.image.array, 0.0)
    deviation = deviation / np.sqrt(np.where(plain.good, plain.variance, 1.0))
    # On finer pixels the noise is that of blocks of so many along an axis.
    block = coadd.metadata.get("oversampling", 1)
    assert isinstance(block, int)
    correlation = noise_correlation(deviation, where, block * (REACH + 1) - 1)
    return plain.correlated(correlation), sigma
