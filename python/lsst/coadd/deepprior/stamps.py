# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Pieces of a patch: templates of sources, their sums and slopes."""

from __future__ import annotations

__all__ = ("Stamp", "render", "slope", "sum_stamps")

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage


class Stamp(NamedTuple):
    """A piece of the patch: ``array[0, 0]`` is its pixel ``(y0, x0)``."""

    y0: int
    x0: int
    array: np.ndarray

    @property
    def slices(self) -> tuple[slice, slice]:
        """The part of the patch that the stamp covers."""
        height, width = self.array.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)

    def cropped(self, shape: tuple[int, int]) -> Stamp:
        """Return the part of the stamp that lies in a patch of some shape."""
        y, x = max(self.y0, 0), max(self.x0, 0)
        stop_y, stop_x = shape[0] - self.y0, shape[1] - self.x0
        return Stamp(y, x, self.array[y - self.y0 : max(stop_y, 0), x - self.x0 : max(stop_x, 0)])


def slope(stamp: Stamp, axis: int) -> Stamp:
    """Return the derivative of a stamp along an axis, to fourth order."""
    stencil = np.array([1.0, -8.0, 0.0, 8.0, -1.0]) / 12.0
    return stamp._replace(array=scipy.ndimage.correlate1d(stamp.array, stencil, axis=axis, mode="constant"))


def sum_stamps(stamps: Sequence[Stamp]) -> Stamp:
    """Add stamps on the smallest box that holds them all."""
    y0, x0 = min(s.y0 for s in stamps), min(s.x0 for s in stamps)
    height = max(s.slices[0].stop for s in stamps) - y0
    width = max(s.slices[1].stop for s in stamps) - x0
    total = np.zeros((height, width))
    for stamp in stamps:
        total[Stamp(stamp.y0 - y0, stamp.x0 - x0, stamp.array).slices] += stamp.array
    return Stamp(y0, x0, total)


def render(templates: Sequence[Stamp], amplitudes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Add up templates times amplitudes on an image of some shape."""
    image = np.zeros(shape)
    for template, amplitude in zip(templates, amplitudes, strict=True):
        image[template.slices] += amplitude * template.array
    return image
