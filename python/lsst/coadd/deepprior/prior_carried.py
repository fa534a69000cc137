# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Which pixels of a restored image the prior carries, and not the data."""

from __future__ import annotations

__all__ = ("prior_carried",)

import numpy as np

from .plain_coadd import Coadd

_LOST = 1.25
"""Significance of the residual under the PSF from which the image may lack light. It is low, since the prior
takes faint structure away most; one sky pixel in ten has so much by noise alone."""

_COVERED = 1.0
"""Standard deviations of the variance plane that cover the mean surface brightness of such light; in the
middle of a source the sharp image would be several times brighter."""

_OUTSHONE = 20.0
"""Significance of the light under the PSF above which it is that of a bright source."""

_SEEN = 3.0
"""Surface brightness, in units of the coadd's noise, above which single pixels of the coadd show it."""

_CLAIMED = 3.0
"""Standard deviations of the variance plane above which the image claims to know of light."""


def prior_carried(
    image: np.ndarray, variance: np.ndarray, residual: np.ndarray, n_good: np.ndarray, coadd: Coadd
) -> np.ndarray:
    """Find the pixels in which the prior carries the structure of a restored image.

    Besides those without data they are of two kinds, for which the variance plane does not answer:

    * The image lacks light: the residual under the PSF is positive, by little, and yet its mean surface
      brightness is more than `_COVERED` standard deviations of the image. The prior took faint structure
      away, or put it elsewhere.
    * The image claims light that a bright source outshines: it is more than `_CLAIMED` standard deviations
      and so faint that no pixel of the coadd shows it, while nearly all light under the PSF comes from beside
      it. How the foot of a star looks at the sharper PSF only the prior says.

    Parameters
    ----------
    image : `numpy.ndarray`, (y, x)
        Restored image in nJy.
    variance : `numpy.ndarray`, (y, x)
        Its variance in nJy^2.
    residual : `numpy.ndarray`, (y, x)
        Coadd of data minus model in nJy.
    n_good : `numpy.ndarray`, (y, x)
        Number of visits with a good pixel.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
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
    shapes = {image.shape, variance.shape, residual.shape, n_good.shape, coadd.shape}
    if len(shapes) > 1:
        raise ValueError(
            f"Image, variance, residual, number of visits and coadd must be of one shape, not {shapes}."
        )
    has_data = coadd.good & (coadd.matched > 0.0)

    def divided(image: np.ndarray, by: np.ndarray) -> np.ndarray:
        return np.divide(image, by, where=has_data, out=np.zeros(coadd.shape))

    def seen(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the significance of light under the PSF, and its mean surface brightness."""
        flux = divided(coadd.correlate(coadd.weight * light, power=1), coadd.matched)
        brightness = divided(flux * coadd.matched, coadd.correlate(coadd.weight, power=1))
        return flux * np.sqrt(coadd.information), brightness

    sigma = np.sqrt(np.where(has_data, variance, np.inf))
    significance, brightness = seen(np.where(coadd.good, residual, 0.0))
    lost = (significance > _LOST) & (brightness > _COVERED * sigma)
    significance, _ = seen(coadd.image)
    claimed = (image > _CLAIMED * sigma) & (image < _SEEN * np.sqrt(coadd.variance))
    return lost | (claimed & (significance > _OUTSHONE)) | (n_good == 0)
