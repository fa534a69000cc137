# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Convolution of images with the same profile along both axes."""

from __future__ import annotations

__all__ = ("gaussian_smooth", "separably_smooth")

from collections.abc import Sequence

import torch
import torch.nn.functional

from .parallel import by_rows
from .psf import gaussian_stamp


def separably_smooth(images: torch.Tensor, profile: Sequence[float], step: int = 1) -> torch.Tensor:
    """Convolve images with a profile along both axes.

    Shifted images are added up, block of rows by block of rows: on a CPU that takes a tenth of the time of
    torch's convolution of a large image with a single channel.

    Parameters
    ----------
    images : `torch.Tensor`, (..., y, x)
        Images; they are zero outside.
    profile : `~collections.abc.Sequence` [`float`]
        The profile, symmetric and of odd length.
    step : `int`, optional
        Distance in pixels of its values.

    Returns
    -------
    smooth : `torch.Tensor`, (..., y, x)
        The convolved images.
    """

    def weighted_sum(total: torch.Tensor, *shifted: torch.Tensor) -> None:
        torch.mul(shifted[0], profile[0], out=total)
        for image, weight in zip(shifted[1:], profile[1:], strict=True):
            total.add_(image, alpha=weight)

    half = len(profile) // 2 * step
    for dim, border in ((-2, (0, 0, half, half)), (-1, (half, half))):
        padded = torch.nn.functional.pad(images, border)
        shifted = [padded.narrow(dim, k * step, images.shape[dim]) for k in range(len(profile))]
        images = torch.empty_like(images)
        by_rows(weighted_sum, images, *shifted)
    return images


def gaussian_smooth(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolve images with a round Gaussian that is sampled at pixel centres.

    Parameters
    ----------
    images : `torch.Tensor`, (..., y, x)
        Images; they are zero outside.
    sigma : `float`
        Sigma in pixels.

    Returns
    -------
    smooth : `torch.Tensor`, (..., y, x)
        The convolved images.
    """
    return separably_smooth(images, gaussian_stamp(sigma).sum(axis=0).tolist())
