# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Pixels of a visit that the sky, as the other visits show it, does not explain."""

from __future__ import annotations

__all__ = ("OUTLIER_PSF_ERROR", "find_outliers")

import torch
import torch.nn.functional

from .psf import gaussian_stamp

_OUTLIER_SIGMA = 5.5
"""Significance of an outlier; noise alone reaches it in one pixel of 30 million."""

_OUTLIER_RIM_SIGMA = 2.5
"""Significance of the pixels around an outlier that are rejected with it."""

OUTLIER_PSF_ERROR = 0.1
"""Relative error granted to the model where outliers are judged, so that a star that moved by a tenth of a
pixel, or varies by some per cent, is not rejected."""

_OUTLIER_SMOOTHING = 1.5
"""Sigma in pixels of the Gaussian that gathers faint trails, a little narrower than usual seeing."""


def find_outliers(residual: torch.Tensor, scale: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Find pixels far from the model, single (cosmic rays) or together (trails), with their neighbourhood.

    Parameters
    ----------
    residual : `torch.Tensor`, (y, x)
        Visit minus model.
    scale : `torch.Tensor`, (y, x)
        Standard deviation of ``residual``, in its unit.
    good : `torch.Tensor`, (y, x), bool
        Pixels that may be used.

    Returns
    -------
    outliers : `torch.Tensor`, (y, x), bool
        Pixels to reject, or to look at.
    """
    deviation = torch.where(good, residual / scale, 0.0)
    kernel = torch.as_tensor(gaussian_stamp(_OUTLIER_SMOOTHING), dtype=scale.dtype, device=scale.device)
    # No pixel counts for more than an outlier, so that a cosmic ray rejects its own surroundings only.
    bounded = deviation.clamp(-_OUTLIER_SIGMA, _OUTLIER_SIGMA)
    smooth, norm = (
        torch.nn.functional.conv2d(image[None, None], k[None, None], padding=k.shape[-1] // 2)[0, 0]
        for image, k in ((bounded, kernel), (good.to(scale.dtype), kernel.square()))
    )
    together = torch.where(good, smooth / norm.clamp_min(1e-6).sqrt(), 0.0)
    return _grown_peaks(deviation.abs(), 1) | _grown_peaks(together.abs(), 3)


def _grown_peaks(significance: torch.Tensor, reach: int) -> torch.Tensor:
    """Return pixels above `_OUTLIER_RIM_SIGMA` within some pixels of one above `_OUTLIER_SIGMA`."""
    peaks = (significance > _OUTLIER_SIGMA).to(significance.dtype)
    near = torch.nn.functional.max_pool2d(peaks[None, None], 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0
    return near & (significance > _OUTLIER_RIM_SIGMA)
