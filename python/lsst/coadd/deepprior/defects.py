# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Shapes of what is wrong with a visit: missing borders and gaps, satellite trails and cosmic rays."""

from __future__ import annotations

__all__ = ("cut_border", "gaps", "masked_cosmic_rays", "trail", "unmasked_cosmic_rays")

import numpy as np

from lsst.images import Box

from .resampling import Resampling


def cut_border(bbox: Box, rng: np.random.Generator) -> Box:
    """Cut a border off a box, so that 30 to 80 per cent of its height or width are left.

    Parameters
    ----------
    bbox : `lsst.images.Box`
        The box.
    rng : `numpy.random.Generator`
        Random numbers.

    Returns
    -------
    cut : `lsst.images.Box`
        What is left of it.
    """
    kept = rng.uniform(0.3, 0.8)
    height, width = round(kept * bbox.y.size), round(kept * bbox.x.size)
    side = rng.integers(4)
    if side == 0:
        return bbox.absolute[: bbox.y.start + height, :]
    if side == 1:
        return bbox.absolute[bbox.y.stop - height :, :]
    if side == 2:
        return bbox.absolute[:, : bbox.x.start + width]
    return bbox.absolute[:, bbox.x.stop - width :]


def gaps(shape: tuple[int, ...], n: int, pixel_scale: float, rng: np.random.Generator) -> np.ndarray:
    """Draw strips along rows or columns, 8 to 12 arcsec wide, as between detectors.

    Parameters
    ----------
    shape : `tuple` [`int`, `int`]
        Height and width of the image.
    n : `int`
        Number of strips.
    pixel_scale : `float`
        Size of a pixel in arcsec.
    rng : `numpy.random.Generator`
        Random numbers.

    Returns
    -------
    gaps : `numpy.ndarray`, (y, x), bool
        Pixels in a strip.
    """
    result = np.zeros(shape, dtype=bool)
    for _ in range(n):
        axis = rng.integers(2)
        width = round(rng.uniform(8.0, 12.0) / pixel_scale)
        first = rng.integers(-width // 2, shape[axis] - width // 2)
        strip = slice(max(0, first), max(0, first + width))
        result[(strip, slice(None)) if axis == 0 else (slice(None), strip)] = True
    return result


def trail(bbox: Box, fwhm: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a satellite trail across the middle half of a box.

    Parameters
    ----------
    bbox : `lsst.images.Box`
        The box.
    fwhm : `float`
        Width of the trail in pixels.
    rng : `numpy.random.Generator`
        Random numbers.

    Returns
    -------
    trail : `numpy.ndarray`, (y, x)
        The trail, 3 to 10 at its ridge.
    """
    angle = rng.uniform(0.0, np.pi)
    centre_x = bbox.x.center + rng.uniform(-0.25, 0.25) * bbox.x.size
    centre_y = bbox.y.center + rng.uniform(-0.25, 0.25) * bbox.y.size
    x, y = bbox.meshgrid()
    distance = (x - centre_x) * np.sin(angle) - (y - centre_y) * np.cos(angle)
    sigma = fwhm / 2.355
    return rng.uniform(3.0, 10.0) * np.exp(-0.5 * (distance / sigma) ** 2)


def masked_cosmic_rays(shape: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the pixels of cosmic rays, 3 to 20 pixels long.

    Parameters
    ----------
    shape : `tuple` [`int`, `int`]
        Height and width of the image.
    n : `int`
        Number of cosmic rays.
    rng : `numpy.random.Generator`
        Random numbers.

    Returns
    -------
    hit : `numpy.ndarray`, (y, x), bool
        Pixels that were hit.
    """
    hit = np.zeros(shape, dtype=bool)
    for _ in range(n):
        length, angle = rng.uniform(3.0, 20.0), rng.uniform(0.0, 2.0 * np.pi)
        step = np.arange(0.0, length, 0.5)
        y = np.rint(rng.uniform(0, shape[0] - 1) + step * np.sin(angle)).astype(int)
        x = np.rint(rng.uniform(0, shape[1] - 1) + step * np.cos(angle)).astype(int)
        inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
        hit[y[inside], x[inside]] = True
    return hit


def unmasked_cosmic_rays(
    shape: tuple[int, ...], n: int, resampling: Resampling | None, rng: np.random.Generator
) -> np.ndarray:
    """Draw short tracks on the detector, of 10 to 80 in each pixel, and resample them.

    Parameters
    ----------
    shape : `tuple` [`int`, `int`]
        Height and width of the image.
    n : `int`
        Number of cosmic rays.
    resampling : `Resampling` or `None`
        Interpolation from the detector; `None` where the image has its pixels.
    rng : `numpy.random.Generator`
        Random numbers.

    Returns
    -------
    image : `numpy.ndarray`, (y, x)
        The cosmic rays.
    """
    detector = np.zeros(shape if resampling is None else resampling.detector_shape)
    for _ in range(n):
        y, x = rng.uniform(0.0, shape[0] - 1.0), rng.uniform(0.0, shape[1] - 1.0)
        if resampling is not None:
            y, x = resampling.to_detector(y, x)
        length, angle = rng.uniform(0.0, 4.0), rng.uniform(0.0, 2.0 * np.pi)
        step = np.arange(0.0, length + 0.5, 0.5)
        track_y = np.clip(np.rint(y + step * np.sin(angle)).astype(int), 0, detector.shape[0] - 1)
        track_x = np.clip(np.rint(x + step * np.cos(angle)).astype(int), 0, detector.shape[1] - 1)
        detector[track_y, track_x] = rng.uniform(10.0, 80.0, step.size)
    return detector if resampling is None else resampling.image(detector)
