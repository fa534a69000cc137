# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The largest values of images in boxes of pixels."""

from __future__ import annotations

__all__ = ("box_maximum",)

import torch
import torch.nn.functional


def box_maximum(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the largest value in the box around every pixel.

    A box of n pixels takes some log2(n) maxima of two images along each axis, which is faster than the
    pooling of torch.

    Parameters
    ----------
    images : `torch.Tensor`, (..., y, x)
        Images of floating point numbers; what is outside counts as less than all of them.
    height, width : `int`
        Odd numbers of pixels of the box.

    Returns
    -------
    maxima : `torch.Tensor`, (..., y, x)
        NaN where the box has a NaN.

    Raises
    ------
    ValueError
        Raised if a box has no central pixel.
    """
    if min(height, width) < 1 or height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"Boxes have odd numbers of pixels, not {height} and {width}.")
    border = (width // 2, width // 2, height // 2, height // 2)
    maxima = torch.nn.functional.pad(images, border, value=-torch.inf)
    for dim, size in ((-2, height), (-1, width)):
        reach = 1
        while reach < size:
            step = min(reach, size - reach)
            n = maxima.shape[dim] - step
            maxima = torch.maximum(maxima.narrow(dim, 0, n), maxima.narrow(dim, step, n))
            reach += step
    return maxima
