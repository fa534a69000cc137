# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The colour picture of a patch."""

from __future__ import annotations

__all__ = ("choose_bands", "draw_colour_picture", "in_order")

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from astropy.visualization import make_lupton_rgb
from matplotlib.figure import Figure

_WAVELENGTHS = "ugrizy"
"""Bands of Rubin, from short to long wavelengths."""

_STRETCH = 5.0
"""Surface brightness, in units of the noise of the coadd, up to which the picture is linear."""

_SOFTENING = 8.0
"""The softening Q of the same picture, as Lupton et al. show the sky with."""

_LEAST_SIZE = 800
"""Pixels of the longer side of a picture; pixels of small patches are shown larger."""

_DPI = 100
"""Pixels of the picture for an inch."""


def in_order(bands: Iterable[str]) -> list[str]:
    """Put bands in the order of their wavelengths.

    Parameters
    ----------
    bands : `~collections.abc.Iterable` [`str`]
        Their names.

    Returns
    -------
    ordered : `list` [`str`]
        The bands of Rubin from short to long wavelengths, then others by their names.
    """
    places = {band: place for place, band in enumerate(_WAVELENGTHS)}
    return sorted(bands, key=lambda band: (places.get(band, len(places)), band))


def choose_bands(bands: Iterable[str]) -> list[str]:
    """Choose the bands that a picture shows as red, green and blue.

    Parameters
    ----------
    bands : `~collections.abc.Iterable` [`str`]
        The bands that there are.

    Returns
    -------
    chosen : `list` [`str`]
        The longest, the middle and the shortest of their wavelengths; a band takes the place of one that is
        missing.
    """
    ordered = in_order(bands)
    return [ordered[-1], ordered[len(ordered) // 2], ordered[0]]


def draw_colour_picture(
    title: str, images: Mapping[str, np.ndarray], noise: float, bands: Sequence[str] = ()
) -> Figure:
    """Draw three bands as red, green and blue (Lupton et al. 2004, PASP 116, 133).

    A source of the same AB magnitude in all of them is white.

    Parameters
    ----------
    title : `str`
        Heading.
    images : `~collections.abc.Mapping` [`str`, `numpy.ndarray`], (y, x)
        Images of the bands at one PSF in nJy, NaN where there is none; they are shown as 0.
    noise : `float`
        Surface brightness in nJy that is taken as the noise.
    bands : `~collections.abc.Sequence` [`str`], optional
        Those shown as red, green and blue, as far as they are there; without any, `choose_bands` chooses.

    Returns
    -------
    figure : `matplotlib.figure.Figure`
        The picture, a square of whole pixels for each pixel of the images, and a line that names the bands.

    Raises
    ------
    ValueError
        Raised if there is no image, their shapes differ, or three bands are not asked for.
    """
    shapes = {image.shape for image in images.values()}
    if len(shapes) != 1:
        raise ValueError(f"A picture needs images of one shape, but they have {sorted(shapes)}.")
    if bands and len(bands) != 3:
        raise ValueError(f"Red, green and blue are three bands, not {', '.join(bands)}.")
    chosen = list(bands) if bands and set(bands) <= set(images) else choose_bands(images)
    red, green, blue = (np.nan_to_num(images[band]) for band in chosen)
    with np.errstate(invalid="ignore"):  # of 0 / 0 where all three bands are dark
        picture = make_lupton_rgb(red, green, blue, stretch=_STRETCH * noise, Q=_SOFTENING)
    scale = max(1, round(_LEAST_SIZE / max(red.shape)))
    height, width = (scale * n for n in red.shape)
    head = 0.5
    size = (width / _DPI, height / _DPI + head)
    figure = Figure(figsize=size, dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0 - head / size[1]))
    axes.imshow(picture, origin="lower", interpolation="nearest")
    axes.set_axis_off()
    names = f"red {chosen[0]}, green {chosen[1]}, blue {chosen[2]}"
    text = f"{title}: {names}"
    figure.text(
        0.5,
        1.0 - 0.5 * head / size[1],
        text,
        ha="center",
        va="center",
        fontsize=min(12.0, 90.0 * size[0] / len(text)),
    )
    return figure
