# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""One figure that shows at a glance what a restoration gained and what it left."""

from __future__ import annotations

__all__ = ("FigureInputs", "choose_zoom", "draw_figure")

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.ndimage
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle, Rectangle
from scipy.spatial import KDTree

from .psf import FWHM_PER_SIGMA

COADD, VISIT, RESTORED, MARK = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
"""Colours that people with colour-blindness tell apart (Okabe & Ito 2008)."""


@dataclasses.dataclass(frozen=True, eq=False)
class FigureInputs:
    """What the figure shows, in plain arrays.

    Parameters
    ----------
    title : `str`
        Heading, e.g. ``tract 9, patch 4, i band``.
    coadd, visit, restored : `numpy.ndarray`, (y, x)
        Plain coadd, best-seeing exposure and restored image of the patch in nJy, NaN where there is no data.
    visit_name : `str`
        What to call the best-seeing exposure.
    residual : `numpy.ndarray`, (y, x)
        Coadd of data minus model in units of its standard deviation.
    noise : `float`
        Standard deviation of a pixel of the plain coadd in nJy.
    psfs : `tuple` [`numpy.ndarray`, ...]
        PSF stamps of plain coadd, best-seeing exposure and restored image.
    fwhm : `tuple` [`float`, ...]
        Their FWHM in pixels.
    sources : `astropy.table.Table`
        Catalogue (see `~lsst.coadd.deepprior.measure.measure_sources`).
    origin : `tuple` [`int`, `int`]
        Tract pixel ``(y0, x0)`` of the first array element.
    pixel_scale : `float`
        Size of a pixel in arcsec.
    curves : `~collections.abc.Mapping` [`str`, `~collections.abc.Sequence` [`float`]]
        Curves of the fit: ``base_objective`` at ``base_step`` and ``held_out`` at ``fit_step``.
    facts : `~collections.abc.Mapping` [`str`, `str`]
        Numbers of the run, by name.
    """

    title: str
    coadd: np.ndarray
    visit: np.ndarray
    restored: np.ndarray
    visit_name: str
    residual: np.ndarray
    noise: float
    psfs: tuple[np.ndarray, np.ndarray, np.ndarray]
    fwhm: tuple[float, float, float]
    sources: Table
    origin: tuple[int, int]
    pixel_scale: float
    curves: Mapping[str, Sequence[float]]
    facts: Mapping[str, str]


def choose_zoom(sources: Table, fwhm: float, centre: tuple[float, float]) -> tuple[float, float]:
    """Choose the most interesting place of a patch.

    Parameters
    ----------
    sources : `astropy.table.Table`
        Catalogue.
    fwhm : `float`
        FWHM of the plain coadd in pixels.
    centre : `tuple` [`float`, `float`]
        Position ``(x, y)`` to return for an empty catalogue.

    Returns
    -------
    x, y : `float`
        Tract pixel: the pair closer than the FWHM of the plain coadd whose fainter member is brightest;
        without one, the brightest source larger than a point; without one, the brightest source. Saturated
        sources, those at an edge and those below S/N 10 do not count.
    """
    good = sources[~(sources["flag_edge"] | sources["flag_saturated"] | sources["flag_no_data"])]
    good = good[good["flux"] > 10.0 * good["flux_err"]]
    if not len(good):
        return centre
    x, y, flux = (np.asarray(good[name], dtype=float) for name in ("x", "y", "flux"))
    pairs = KDTree(np.stack([x, y], axis=1)).query_pairs(fwhm, output_type="ndarray")
    if len(pairs):
        pair = pairs[flux[pairs].min(axis=1).argmax()]
        return float(x[pair].mean()), float(y[pair].mean())
    size = np.nan_to_num(np.asarray(good["ixx"] + good["iyy"], dtype=float))
    extended = size > 1.5 * np.median(size)
    best = np.where(extended, flux, 0.0).argmax() if extended.any() else flux.argmax()
    return float(x[best]), float(y[best])


def draw_figure(inputs: FigureInputs) -> Figure:
    """Draw the figure.

    Parameters
    ----------
    inputs : `FigureInputs`
        What to show.

    Returns
    -------
    figure : `matplotlib.figure.Figure`
        Plain coadd, best-seeing exposure, restored image and residual, whole and zoomed; PSFs; curves of
        the fit; numbers.
    """
    whole, zoom = _data_box(inputs), _zoom_box(inputs)
    aspect = min(max((whole[3] - whole[2]) / (whole[1] - whole[0]), 0.5), 2.0)
    heights = (0.4 + 3.75 * aspect + 3.75, 3.2)
    figure = Figure(figsize=(16.0, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(inputs.title, fontsize=18, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    grid = top.add_gridspec(2, 5, width_ratios=[1.0, 1.0, 1.0, 1.0, 0.04], height_ratios=[aspect, 1.0])
    for row, box in enumerate((whole, zoom)):
        axes = [top.add_subplot(grid[row, column]) for column in range(4)]
        residual = _draw_images(axes, inputs, box)
        bar = top.colorbar(residual, cax=top.add_subplot(grid[row, 4]))
        bar.set_label("standard deviations", fontsize=12)
        for panel, ink in zip(axes, _INK, strict=True):
            if row == 0:
                side = zoom[1] - zoom[0]
                panel.add_patch(Rectangle((zoom[0], zoom[2]), side, side, fill=False, lw=1.6, ec=ink))
            else:
                _mark_sources(panel, inputs, zoom, ink)
    _title_images(top.axes[:4], inputs)

    left, middle, right = bottom.subplots(1, 3, width_ratios=[1.0, 1.0, 1.7])
    _draw_psfs(left, inputs)
    _draw_curves(middle, inputs.curves)
    _write_facts(right, inputs.facts)
    return figure


_FACT_LENGTH = 36
"""Number of letters that a name and its value have room for in one line."""

_INK = ("white", "white", "white", "black")
"""Colour of what is drawn on coadd, exposure, restored image and residual."""


def _data_box(inputs: FigureInputs) -> tuple[float, float, float, float]:
    """Return the limits (left, right, bottom, top) of the part with data, in array coordinates."""
    seen = np.isfinite(inputs.coadd)
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        return -0.5, seen.shape[1] - 0.5, -0.5, seen.shape[0] - 0.5
    return columns[0] - 0.5, columns[-1] + 0.5, rows[0] - 0.5, rows[-1] + 0.5


def _zoom_box(inputs: FigureInputs) -> tuple[float, float, float, float]:
    """Return the limits of the zoom, which stays inside the part with data."""
    left, right, bottom, top = _data_box(inputs)
    y0, x0 = inputs.origin
    centre = (x0 + 0.5 * (left + right), y0 + 0.5 * (bottom + top))
    x, y = choose_zoom(inputs.sources, inputs.fwhm[0], centre)
    half = min(max(4.0 * inputs.fwhm[0], 12.0), 0.5 * (right - left), 0.5 * (top - bottom))
    x = min(max(x - x0, left + half), right - half)
    y = min(max(y - y0, bottom + half), top - half)
    return x - half, x + half, y - half, y + half


def _draw_images(
    axes: Sequence[Axes], inputs: FigureInputs, box: tuple[float, float, float, float]
) -> AxesImage:
    """Draw a part of coadd, exposure, restored image and residual; return the last.

    The three images share one asinh stretch, linear near the noise of the coadd and logarithmic far above.
    """
    ys = slice(max(math.floor(box[2]), 0), math.ceil(box[3]) + 1)
    xs = slice(max(math.floor(box[0]), 0), math.ceil(box[1]) + 1)
    shown = inputs.restored[ys, xs]
    brightest = np.percentile(shown[np.isfinite(shown)], 99.7) if np.isfinite(shown).any() else 0.0
    top = max(float(brightest), 20.0 * inputs.noise)
    soft = max(3.0 * inputs.noise, 0.02 * top)
    stretch = FuncNorm(
        (lambda v: np.arcsinh(v / soft), lambda v: soft * np.sinh(v)), vmin=-1.5 * inputs.noise, vmax=top
    )
    for panel, image, ink in zip(
        axes, (inputs.coadd, inputs.visit, inputs.restored, inputs.residual), _INK, strict=True
    ):
        if ink == "white":
            drawn = panel.imshow(image, origin="lower", cmap="inferno", norm=stretch)
        else:
            drawn = panel.imshow(image, origin="lower", cmap="RdBu_r", norm=Normalize(-5.0, 5.0))
        panel.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[], facecolor="0.6")
        _scale_bar(panel, box, inputs.pixel_scale, ink)
    return drawn


def _title_images(axes: Sequence[Axes], inputs: FigureInputs) -> None:
    """Write what the columns are, with the FWHM of each image."""
    names = ("Plain coadd", f"Best exposure ({inputs.visit_name})", "Restored")
    for panel, name, width in zip(axes, names, inputs.fwhm, strict=False):
        panel.set_title(f"{name}, FWHM {width * inputs.pixel_scale:.2f}\u2033", fontsize=13)
    axes[3].set_title("Data \u2212 model", fontsize=13)


def _mark_sources(axes: Axes, inputs: FigureInputs, box: tuple[float, float, float, float], ink: str) -> None:
    """Circle the sources of the catalogue that lie in a box."""
    x = np.asarray(inputs.sources["x"]) - inputs.origin[1]
    y = np.asarray(inputs.sources["y"]) - inputs.origin[0]
    inside = (x > box[0]) & (x < box[1]) & (y > box[2]) & (y < box[3])
    for position in zip(x[inside], y[inside], strict=True):
        axes.add_patch(
            Circle(position, 0.7 * inputs.fwhm[2], fill=False, lw=1.4, ec=MARK if ink == "white" else ink)
        )


def _scale_bar(axes: Axes, box: tuple[float, float, float, float], pixel_scale: float, ink: str) -> None:
    """Draw a bar of a round number of arcsec, near a quarter of the width, in the lower left corner."""
    width, height = box[1] - box[0], box[3] - box[2]
    choices = np.outer(10.0 ** np.arange(-1, 4), (1.0, 2.0, 5.0)).ravel()
    length = choices[np.abs(np.log(choices / (0.22 * width * pixel_scale))).argmin()]
    x, y = box[0] + 0.06 * width, box[2] + 0.06 * height
    axes.plot([x, x + length / pixel_scale], [y, y], color=ink, lw=3, solid_capstyle="butt")
    middle = x + 0.5 * length / pixel_scale
    axes.text(
        middle, y + 0.02 * height, f"{length:g}\u2033", color=ink, fontsize=12, ha="center", va="bottom"
    )


def _draw_psfs(axes: Axes, inputs: FigureInputs) -> None:
    """Draw radial profiles of the PSFs, and the pixels of a star of the restored image."""
    labels = ("plain coadd", "best exposure", "restored")
    radii = np.linspace(0.0, 1.5 * inputs.fwhm[0], 60)
    angles = np.linspace(0.0, 2.0 * np.pi, 32, endpoint=False)
    circles = np.stack([np.outer(radii, np.sin(angles)), np.outer(radii, np.cos(angles))])
    for stamp, label, colour in zip(inputs.psfs, labels, (COADD, VISIT, RESTORED), strict=True):
        profile = scipy.ndimage.map_coordinates(stamp, stamp.shape[0] // 2 + circles, order=3).mean(axis=1)
        axes.plot(radii * inputs.pixel_scale, profile / profile[0], lw=2.5, color=colour, label=label)
    star = _star_pixels(inputs)
    if star is not None:
        axes.plot(
            star[0] * inputs.pixel_scale,
            star[1],
            ".",
            ms=5,
            color="black",
            label="a star, restored",
            zorder=3,
        )
    axes.set(
        xlim=(0.0, radii[-1] * inputs.pixel_scale),
        ylim=(-0.04, 1.08),
        xlabel="radius [arcsec]",
        ylabel="relative to peak",
        title="PSF",
    )
    axes.legend(frameon=False)


def _star_pixels(inputs: FigureInputs) -> tuple[np.ndarray, np.ndarray] | None:
    """Return radius in pixels and relative brightness of the pixels of the brightest isolated star.

    It must be beyond doubt a star, with S/N above 50, the size of the target PSF within 5 per cent, round,
    and with no other source within 2 FWHM of the plain coadd.
    """
    sources = inputs.sources
    sigma = inputs.fwhm[2] / FWHM_PER_SIGMA
    suitable = np.asarray(sources["flux"] > 50.0 * sources["flux_err"])
    for flag in ("edge", "no_data", "saturated", "blended", "residual_only"):
        suitable &= ~np.asarray(sources[f"flag_{flag}"])
    ixx, iyy, ixy = (np.asarray(sources[name], dtype=float) for name in ("ixx", "iyy", "ixy"))
    suitable &= np.abs(np.sqrt(0.5 * (ixx + iyy)) / sigma - 1.0) < 0.05
    suitable &= np.hypot(ixx - iyy, 2.0 * ixy) < 0.05 * (ixx + iyy)
    positions = np.stack([sources["x"], sources["y"]], axis=1)
    suitable[KDTree(positions).query_pairs(2.0 * inputs.fwhm[0], output_type="ndarray").ravel()] = False
    stars = sources[suitable]
    if not len(stars):
        return None
    star = stars[np.argmax(stars["flux"])]
    x, y = star["x"] - inputs.origin[1], star["y"] - inputs.origin[0]
    rows, columns = np.indices(inputs.restored.shape)
    radius = np.hypot(rows - y, columns - x)
    near = radius < 3.0 * sigma
    gaussian = np.exp(-0.5 * (radius[near] / sigma) ** 2)
    values = inputs.restored[near]
    return radius[near], values * (gaussian @ gaussian) / (gaussian @ values)


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the loss of the base on its own visits, then that of the network on held-out visits."""
    axes.set(xlabel="step", ylabel="loss per pixel", title="Fit")
    base, fit = np.asarray(curves["base_objective"]), np.asarray(curves["held_out"])
    base_step, fit_step = np.asarray(curves["base_step"]), np.asarray(curves["fit_step"])
    last = base_step[-1] if len(base_step) else 0.0
    axes.plot(base_step, base, lw=2, color=VISIT, label="base, on its own visits")
    low = high = base[-1]
    if len(fit):
        axes.plot(last + fit_step, fit, lw=2, color=RESTORED, label="network, on held-out visits")
        low, high = min(low, fit.min()), max(low, fit.max())
    margin = max(0.5 * (high - low), 0.005 * high)
    axes.set_ylim(low - margin, high + 2.0 * margin)
    axes.legend(frameon=False, loc="upper right")


def _write_facts(axes: Axes, facts: Mapping[str, str]) -> None:
    """Write the numbers of the run in two columns."""
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0), title="Numbers")
    axes.set_axis_off()
    rows = max(math.ceil(len(facts) / 2), 1)
    for n, (name, value) in enumerate(facts.items()):
        column, row = divmod(n, rows)
        left, right = 0.52 * column, 0.52 * column + 0.48
        y = 1.0 - (row + 0.5) / rows
        axes.text(left, y, name, fontsize=11.5, color="0.35", va="center")
        lines = textwrap.wrap(value, _FACT_LENGTH - len(name)) or [""]
        size = 12.0 if len(lines) == 1 else 10.5
        axes.text(right, y, "\n".join(lines), fontsize=size, ha="right", va="center", linespacing=1.1)
        if row:
            axes.plot([left, right], [y + 0.5 / rows] * 2, color="0.85", lw=0.8)
