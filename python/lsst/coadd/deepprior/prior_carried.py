# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Which pixels of a restored image the prior carries, and not the data."""

from __future__ import annotations

__all__ = ("prior_carried",)

import numpy as np

from .joint_fit import Coadd

_EVIDENCE = 1.3
"""Significance of the light under the PSF from which there may be structure. It is low, since the prior takes
faint structure away most; one sky pixel in ten has so much by noise alone."""

_CERTAIN = 8.0
"""Significance above which the data says by itself how light is distributed."""

_SEEN = 3.0
"""Surface brightness, in units of the coadd's noise, above which single pixels of the coadd show it."""

_COVERED = 5.0
"""Standard deviations of the variance plane that cover what the prior may have done."""


def prior_carried(image: np.ndarray, variance: np.ndarray, n_good: np.ndarray, coadd: Coadd) -> np.ndarray:
    """Find the pixels in which the prior carries the structure of a restored image.

    They are those without data, and those of faint structure for which the variance plane does not answer:
    the data has some light under the PSF, too little to tell where in it, and its mean surface brightness is
    more than `_COVERED` standard deviations of the restored image. If the prior put that light elsewhere, or
    took it away, the error of the image is not that of its variance plane.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Restored image in nJy.
    variance : `numpy.ndarray`, (y, x)
        Its variance in nJy^2.
    n_good : `numpy.ndarray`, (y, x)
        Number of visits with a good pixel.
    coadd : `~lsst.coadd.deepprior.joint_fit.Coadd`
        The plain coadd.

    Returns
    -------
    carried : `numpy.ndarray`, (y, x), bool
        The pixels.

    Raises
    ------
    ValueError
        Raised if the shapes differ.
    """
    shapes = {image.shape, variance.shape, n_good.shape, coadd.shape}
    if len(shapes) > 1:
        raise ValueError(f"Image, variance, number of visits and coadd must be of one shape, not {shapes}.")
    has_data = coadd.good & (coadd.matched > 0.0)

    def divided(image: np.ndarray, by: np.ndarray) -> np.ndarray:
        return np.divide(image, by, where=has_data, out=np.zeros(coadd.shape))

    flux = divided(coadd.correlate(coadd.weight * coadd.image, power=1), coadd.matched)
    significance = flux * np.sqrt(coadd.information)
    structure = has_data & (significance > _EVIDENCE) & (significance < _CERTAIN)
    structure &= image < _SEEN * np.sqrt(coadd.variance)
    del significance
    brightness = divided(flux * coadd.matched, coadd.correlate(coadd.weight, power=1))
    with np.errstate(invalid="ignore"):
        structure &= brightness > _COVERED * np.sqrt(variance)
    return structure | (n_good == 0)
