# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""First guesses for pixels without data, from those around them; the data then decide."""

from __future__ import annotations

__all__ = ("between_samples", "filled_from_neighbours")

import torch
import torch.nn.functional

from .box_maximum import box_maximum

_FALL = 0.75
"""Brightness of a pixel without data as part of its brightest neighbour, so that the guess for a saturated
core falls off inwards."""


def between_samples(images: torch.Tensor, step: int) -> torch.Tensor:
    """Interpolate linearly along both axes between the pixels that visits have.

    Parameters
    ----------
    images : `torch.Tensor`, (set, y, x)
        Images on a grid finer than that of the visits; NaN where no visit has a pixel.
    step : `int`
        Distance in pixels from one pixel that visits have to the next. Such a pixel is centred at its fine
        pixel or, with an even step, half a pixel beyond it.

    Returns
    -------
    interpolated : `torch.Tensor`, (set, y, x)
        NaN farther than a step from all pixels that have a value.
    """
    distance = torch.arange(step, -step - 1, -1, dtype=images.dtype, device=images.device)
    row = (1.0 - (distance - 0.5 * ((step - 1) % 2)).abs() / step).clamp_min(0.0)
    kernel = torch.outer(row, row)[None, None]
    values, weights = (
        torch.nn.functional.conv2d(image[:, None], kernel, padding=step)[:, 0]
        for image in (images.nan_to_num(0.0), images.isfinite().to(images.dtype))
    )
    return torch.where(weights > 0.0, values / weights, torch.nan)


def filled_from_neighbours(images: torch.Tensor, reach: int) -> torch.Tensor:
    """Give pixels without a value three quarters of the brightest of their neighbours, rim by rim.

    Parameters
    ----------
    images : `torch.Tensor`, (set, y, x)
        Images, NaN where they have no value.
    reach : `int`
        Largest distance in pixels from a value.

    Returns
    -------
    filled : `torch.Tensor`, (set, y, x)
        NaN beyond the reach.
    """
    for _ in range(reach):
        if not bool(images.isnan().any()):
            break
        nearest = box_maximum(images.nan_to_num(-torch.inf), 3, 3)
        images = torch.where(images.isnan() & nearest.isfinite(), _FALL * nearest, images)
    return images
