# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Rows of several scenes to one number a measure, and which of two numbers is worse."""

from __future__ import annotations

__all__ = ("MEASURES", "Measure", "summarise", "worse")

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a number is made of rows and shown.

    Parameters
    ----------
    title : `str`
        What tables call it.
    source : `str`
        Entry of the rows.
    how : `str`
        ``median`` of the scenes' numbers; or of all objects of all scenes together: ``objects``, their
        median; ``bias``, their median deviation from 1; ``rms``, their standard deviation; ``share``, their
        mean; ``largest``.
    better : `str`
        ``high``, ``low``, or ``zero`` where the absolute value counts.
    per_cent : `bool`
        Whether it is shown in per cent.
    """

    title: str
    source: str
    how: str
    better: str
    per_cent: bool = False

    def text(self, number: float) -> str:
        """Return a number as tables show it."""
        if not math.isfinite(number):
            return "-"
        sign = "+" if self.better == "zero" else ""
        if self.per_cent:
            return f"{100.0 * number:{sign}.2f} %"
        return f"{number:{sign}.3f}" if not self.source.startswith("psnr") else f"{number:.2f}"


MEASURES: dict[str, Measure] = {
    "ssim": Measure("SSIM", "ssim", "median", "high"),
    "ssim_no_halo": Measure("SSIM without halos", "ssim_no_halo", "median", "high"),
    "psnr": Measure("PSNR (dB)", "psnr", "median", "high"),
    "psnr_no_halo": Measure("PSNR without halos (dB)", "psnr_no_halo", "median", "high"),
    "nrmse": Measure("linear NRMSE", "nrmse", "median", "low"),
    "sky_mean": Measure("sky mean", "sky_mean", "median", "zero"),
    "sky_error": Measure("sky mean minus truth", "sky_error", "median", "zero"),
    "sky_rms": Measure("sky rms", "sky_rms", "median", "low"),
    "artifacts": Measure("left of artifacts", "artifacts", "median", "zero"),
    "seam": Measure("step at cell borders", "seam", "median", "low"),
    "seam_ratio": Measure("step over rms of other steps", "seam_ratio", "median", "low"),
    "rings": Measure("largest ring", "rings", "largest", "low"),
    "not_finite": Measure("pixels not finite", "not_finite", "median", "low", True),
    "star_size": Measure("star size", "star_size", "bias", "zero", True),
    "star_ellipticity": Measure("star ellipticity", "star_ellipticity", "objects", "low"),
    "star_e1": Measure("star e1", "star_e1", "objects", "zero"),
    "star_e2": Measure("star e2", "star_e2", "objects", "zero"),
    "star_flux": Measure("star flux bias", "flux_stars", "bias", "zero", True),
    "star_flux_rms": Measure("star flux rms", "flux_stars", "rms", "low", True),
    "galaxies_22_24": Measure("flux bias, galaxies 22-24", "flux_galaxies_22_24", "bias", "zero", True),
    "galaxies_22_24_rms": Measure("rms", "flux_galaxies_22_24", "rms", "low", True),
    "galaxies_24_25.5": Measure("flux bias, galaxies 24-25.5", "flux_galaxies_24_25.5", "bias", "zero", True),
    "galaxies_24_25.5_rms": Measure("rms", "flux_galaxies_24_25.5", "rms", "low", True),
    "completeness": Measure("completeness at 95 % purity", "completeness", "median", "high"),
    "pairs": Measure("pairs split", "pairs_split", "share", "high"),
}
"""Measures of an image by name (`dict` [`str`, `Measure`])."""

MEASURES |= {
    f"catalogue_{name}": dataclasses.replace(
        MEASURES[name],
        title=f"catalogue: {MEASURES[name].title}",
        source=f"catalogue_{MEASURES[name].source}",
    )
    for name in (
        "star_flux",
        "star_flux_rms",
        "galaxies_22_24",
        "galaxies_24_25.5",
        "completeness",
        "pairs",
    )
}

MEASURES |= {
    f"with_residual_{name}": dataclasses.replace(
        MEASURES[name],
        title=f"model plus residual: {MEASURES[name].title}",
        source=f"with_residual_{MEASURES[name].source}",
    )
    for star_or_galaxy in ("star_flux", "galaxies_22_24", "galaxies_24_25.5")
    for name in (star_or_galaxy, f"{star_or_galaxy}_rms")
}


def summarise(rows: Sequence[Row], name: str) -> tuple[float, float, int]:
    """Return the number of a measure over scenes.

    Parameters
    ----------
    rows : `~collections.abc.Sequence` [`dict`]
        Rows of the scenes.
    name : `str`
        One of `MEASURES`.

    Returns
    -------
    number : `float`
        NaN without values.
    error : `float`
        Its standard error, from the scatter of scenes or objects; NaN where it is not known.
    n : `int`
        Number of scenes or objects.
    """
    measure = MEASURES[name]
    entries = [row[measure.source] for row in rows if row.get(measure.source) is not None]
    pooled = measure.how != "median"
    values = np.array([v for entry in entries for v in entry] if pooled else entries, dtype=float)
    n = len(values)
    if n == 0:
        return math.nan, math.nan, 0
    scatter = float(values.std(ddof=1)) if n > 1 else math.nan
    if measure.how == "rms":
        return scatter, scatter / math.sqrt(2.0 * n), n
    if measure.how == "share":
        return float(values.mean()), scatter / math.sqrt(n), n
    if measure.how == "largest":
        return float(values.max()), math.nan, n
    # The error of a median is 1.25 times that of a mean (normal distribution); robust against outliers.
    width = 1.4826 * float(np.median(np.abs(values - np.median(values)))) if n > 2 else math.nan
    return float(np.median(values)) - (measure.how == "bias"), 1.253 * width / math.sqrt(n), n


def worse(name: str, number: float, than: float) -> bool:
    """Return whether a number of a measure is worse than another; NaN is not."""
    better = MEASURES[name].better
    if better == "high":
        return number < than
    return abs(number) > abs(than)
