# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Sources of a restored patch, measured so that the prior cancels.

The restored image ``x`` has the target PSF ``g``; the residual coadd ``r`` holds what the model did not
explain, at the PSF ``P`` of the plain coadd. Carried to that PSF, the model and the residual give back the
data,

    D = x * (P / g) + r,

whatever the prior took away or added. ``x`` says where sources are and how they share the light; every
number is then fitted to ``D``, with the errors of the data.
"""

from __future__ import annotations

__all__ = ("MeasureInputs", "measure_sources")

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.ndimage
from astropy import units as u
from astropy.table import Column, Table

from .aperture_fluxes import APERTURES, point_and_aperture_fluxes
from .deblend import BLEND, DetectionSettings, detect_sources, shown, significance
from .joint_fit import JointFit
from .moments import adaptive_moments, centroid, peak_offset
from .plain_coadd import Coadd
from .source_fit import SYSTEMATIC_FLOOR, fit_sources
from .stamps import Stamp, render, slope

_LEAST_DISTANCE = 0.5
"""Distance in FWHM below which what a fitted source leaves of the data is taken as its own: two templates so
near to each other share the flux at random."""

_RING = (1.5, 2.5)
"""Half the sides in FWHM of the square ring above which a source must rise that the restored image does not
show: smooth light is none."""

_LEAST_SHARE = 0.6
"""Part of the least S/N that a flux of a source must have in the end. That of a galaxy falls with what is not
known of its shape; what was found on smooth light has none above the sky."""

_UNSEEN_EXTENT = 1.5
"""Radius in FWHM of the region in which a source that the restored image does not show may be brighter than
the noise; of a point with a S/N of 10 that it shows, grown as pieces are, it is about as much."""

_COLUMNS: dict[str, tuple[type, u.UnitBase | None, str]] = {
    "id": (int, None, "Number of the source within its tract, patch and band, from 1, brightest first."),
    "x": (float, u.pix, "Position on the tract's pixel grid, x."),
    "y": (float, u.pix, "Position on the tract's pixel grid, y."),
    "x_err": (float, u.pix, "Standard error of x from the noise of the data."),
    "y_err": (float, u.pix, "Standard error of y from the noise of the data."),
    "ra": (float, u.deg, "Right ascension (ICRS)."),
    "dec": (float, u.deg, "Declination (ICRS)."),
    "flux": (float, u.nJy, "Total flux: joint fit of points, round and elliptical galaxies to the data."),
    "flux_err": (
        float,
        u.nJy,
        "Standard error of flux: noise of the data with its covariance, positions, neighbours, "
        "flux_template_err and flux_confusion_err.",
    ),
    "flux_template_err": (
        float,
        u.nJy,
        "Part of flux_err from what is not known of the shapes of the source and of its neighbours.",
    ),
    "flux_confusion_err": (
        float,
        u.nJy,
        "Part of flux_err from sources too faint to be found, whose light scatters at blank places.",
    ),
    "flux_sys_err": (
        float,
        u.nJy,
        "Systematic error of flux from PSF models and flux scale, 0.5 % of it; not in flux_err.",
    ),
    "psf_flux": (float, u.nJy, "Point-source flux: joint fit of the coadd PSF to the data at all positions."),
    "psf_flux_err": (float, u.nJy, "Standard error of psf_flux."),
    **{
        f"ap{n}_{suffix}": (float, u.nJy, text.format(radius))
        for n, radius in enumerate(APERTURES, start=1)
        for suffix, text in (
            (
                "flux",
                "Data within {} coadd_fwhm of the position, neighbours subtracted, no aperture correction; "
                "pixels without data count with the source as it was fitted.",
            ),
            (
                "flux_err",
                "Standard error of the flux within {} coadd_fwhm, for the part without data that of the fit.",
            ),
        )
    },
    "ixx": (float, u.pix**2, "Adaptive second moment on the restored image, target PSF included, xx."),
    "iyy": (float, u.pix**2, "Adaptive second moment on the restored image, target PSF included, yy."),
    "ixy": (float, u.pix**2, "Adaptive second moment on the restored image, target PSF included, xy."),
    "coadd_fwhm": (float, u.pix, "FWHM of the plain coadd's PSF at the source; unit of the aperture radii."),
    "is_patch_inner": (
        bool,
        None,
        "The position is in the inner box of the patch, which no other patch shares.",
    ),
    "flag_edge": (
        bool,
        None,
        "Closer than 2 coadd_fwhm to the border of the patch: part of the light is missing, and light from "
        "beyond the border is not subtracted exactly.",
    ),
    "flag_no_data": (bool, None, "A pixel in the core of the source has no data."),
    "flag_saturated": (bool, None, "A pixel in the core of the source is saturated in a visit."),
    "flag_clipped": (bool, None, "A pixel in the core of the source was rejected as an outlier in a visit."),
    "flag_prior_carried": (bool, None, "The prior and not the data carries at least half of the core."),
    "flag_extended": (bool, None, "Wider than the PSF by more than 3 standard errors and by more than 2 %."),
    "flag_blended": (bool, None, "Shares light with another source of the catalogue."),
    "flag_residual_only": (
        bool,
        None,
        "Found in what the restored image leaves of the data, not in the image.",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class MeasureInputs:
    """A restored patch in plain arrays.

    Parameters
    ----------
    model : `numpy.ndarray`, (y, x)
        Restored image in nJy; NaN is taken as 0.
    model_variance : `numpy.ndarray`, (y, x)
        Its variance in nJy^2, NaN where it is not known.
    target_sigma : `float`
        Sigma in pixels of the Gaussian PSF of ``model``.
    coadd : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd, made of ``model`` and the residual.
    planes : `~collections.abc.Mapping` [`str`, `numpy.ndarray`]
        Mask planes, (y, x) bool, by name; ``SAT``, ``CLIPPED`` and ``PRIOR_CARRIED`` become flags.
    origin : `tuple` [`int`, `int`]
        Tract pixel ``(y0, x0)`` of the first array element.
    inner : `tuple` [`slice`, `slice`]
        Tract pixels ``(y, x)`` of the inner box of the patch.

    Raises
    ------
    ValueError
        Raised if the shapes do not fit together.
    """

    model: np.ndarray
    model_variance: np.ndarray
    target_sigma: float
    coadd: Coadd
    planes: Mapping[str, np.ndarray]
    origin: tuple[int, int]
    inner: tuple[slice, slice]

    @property
    def clipped(self) -> np.ndarray:
        """Pixels that were rejected as outliers in a visit (`numpy.ndarray`, (y, x), bool)."""
        return self.planes.get("CLIPPED", np.zeros(self.coadd.shape, dtype=bool))

    def __post_init__(self) -> None:
        shape = self.coadd.shape
        images = {"model": self.model, "model_variance": self.model_variance, **self.planes}
        for name, image in images.items():
            if image.shape != shape:
                raise ValueError(
                    f"The {name} image is {image.shape} and the coadd {shape}; they must be equal."
                )


def measure_sources(
    inputs: MeasureInputs,
    pixel_to_sky: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    settings: DetectionSettings = DetectionSettings(),  # noqa: B008
) -> Table:
    """Detect and measure the sources of a restored patch.

    Parameters
    ----------
    inputs : `MeasureInputs`
        Model and plain coadd.
    pixel_to_sky : `~collections.abc.Callable`
        Function of tract pixels ``x`` and ``y`` that returns right ascension and declination in degrees.
    settings : `DetectionSettings`
        Thresholds.

    Returns
    -------
    sources : `astropy.table.Table`
        One row a source, brightest first, with a description and, where it has one, a unit for each column.

    Notes
    -----
    *Detection.* ``x`` above a low threshold is divided between its peaks; their joint fluxes and errors come
    from the data. What stays below ``min_snr`` is merged into the neighbour it overlaps most or, if it
    overlaps none, dropped. Peaks above ``min_snr`` in what the fit leaves of ``D`` are added, with the PSF as
    their template, except near pixels that were rejected as outliers in a visit and where ``x`` has no light:
    what is left there is rather the rest of a trail or a cosmic ray. Such a peak must rise above its
    surroundings, so that smooth light, of a nebula, is none. They are looked for once more in what the fit of
    all profiles leaves: a source that the restored image merged with a galaxy shows when the galaxy has a
    profile of its own. Sources that in the end have lost their light to the sky and to their neighbours are
    left out.

    *Flux.* All sources are fitted to ``D`` together, as points, round or elliptical galaxies (see
    `~lsst.coadd.deepprior.source_fit.fit_sources`), whose pixels have, as those of ``D``, the PSF of the cell
    that they are in. The restored image only says where they are: a template
    from it would hold some of the noise that it is fitted to. What two points fit better than a galaxy takes
    two rows, without second moments. Each pixel of ``x`` is shared between the sources that reach it in
    proportion to ``min(x(p), x(p'))``, with p' the mirror image of p about the source (the deblender of SDSS,
    Lupton 2001); the pieces are the templates of sources that have no data under their PSF. Neighbours of
    aperture fluxes are subtracted as they were fitted. Linear fits, ``f = N^-1 T^T W D`` with ``N = T^T W
    T``, have the noise ``N^-1 T^T W C W T N^-1``, with ``C`` the covariance of the data: variances, and the
    correlation of neighbouring pixels. ``W`` is one weight a cell, so that the photon noise of a pixel does
    not bias the flux.

    *Position.* That of the fit; it starts from the centroid on ``x`` plus the linear fit of the templates'
    gradients to what is left of ``D``, so that a centroid that the prior has pulled is put right.
    """
    pieces, templates = _detected(inputs, settings) if inputs.coadd.good.any() else ([], [])
    if not templates:
        return _table({name: np.zeros(0) for name in _COLUMNS})
    columns = _columns_of(pieces, templates, inputs)
    columns, stamps, sky, sky_error = _with_profiles(columns, pieces, templates, inputs, settings)
    y, x = columns["y"], columns["x"]
    fitted = columns["flux"], columns["flux_err"]
    columns |= point_and_aperture_fluxes(y, x, stamps, *fitted, inputs.coadd.without(sky), sky_error)
    columns["flux_sys_err"] = SYSTEMATIC_FLOOR * np.abs(columns["flux"])
    columns |= _core_flags(y, x, columns["coadd_fwhm"], inputs.coadd.good, inputs.planes)
    columns |= _places(y, x, columns["coadd_fwhm"], inputs)
    columns["ra"], columns["dec"] = pixel_to_sky(columns["x"], columns["y"])
    order = np.argsort(-columns["flux"], kind="stable")
    order = order[~_faded(columns, settings)[order]]
    columns = {name: values[order] for name, values in columns.items()}
    columns["id"] = np.arange(1, len(order) + 1)
    return _table(columns)


def _detected(inputs: MeasureInputs, settings: DetectionSettings) -> tuple[list[Stamp], list[Stamp]]:
    """Find sources; return the parts of the model that belong to those it shows, and, behind theirs, the
    templates of all.
    """
    coadd = inputs.coadd
    model = np.where(np.isfinite(inputs.model), inputs.model, 0.0).astype(np.float32)
    model_error = np.sqrt(np.where(inputs.model_variance > 0.0, inputs.model_variance, 0.0))
    pieces, templates = detect_sources(model, model_error, inputs.target_sigma, coadd, settings)
    # With the slopes, so that a source that the prior has displaced is not found once more beside itself.
    basis = [*templates, *_slopes(templates)]
    fitted = render(basis, JointFit.of(basis, coadd).solution() if basis else np.zeros(0), coadd.shape)
    templates += _missed(fitted, coadd, _doubtful(inputs, settings), settings)
    while templates:
        keep = significance(JointFit.of(templates, coadd), settings) >= settings.min_snr
        if keep.all():
            break
        pieces = [piece for piece, kept in zip(pieces, keep, strict=False) if kept]
        templates = [template for template, kept in zip(templates, keep, strict=True) if kept]
    return pieces, templates


def _columns_of(
    pieces: Sequence[Stamp], templates: Sequence[Stamp], inputs: MeasureInputs
) -> dict[str, np.ndarray]:
    """Measure sources by linear fits of their templates and the slopes of these; positions are in the array
    of the patch.
    """
    n, coadd = len(templates), inputs.coadd
    moments = np.full((n, 5), np.nan)
    for k, template in enumerate(templates):
        if k < len(pieces):
            moments[k] = adaptive_moments(pieces[k], inputs.target_sigma)
        else:
            moments[k, :2] = centroid(template)
    fit = JointFit.of(templates, coadd)
    flux = fit.solution()
    # A source displaced by d pixels looks like flux * T - flux * d * slope of T.
    shift_fit = JointFit.of([*templates, *_slopes(templates)], coadd)
    limit = 0.5 * np.nanmedian(coadd.fwhm)
    shift = np.clip(-shift_fit.solution()[n:].reshape(2, n) / flux, -limit, limit)
    y_err, x_err = shift_fit.errors()[n:].reshape(2, n) / flux
    return dict(zip(("iyy", "ixx", "ixy"), moments[:, 2:].T, strict=True)) | {
        "y": moments[:, 0] + shift[0],
        "x": moments[:, 1] + shift[1],
        "y_err": y_err,
        "x_err": x_err,
        "flux": flux,
        "flux_err": fit.errors(),
        "flux_template_err": np.zeros(n),
        "flux_confusion_err": np.zeros(n),
        "flag_extended": np.zeros(n, dtype=bool),
        "flag_residual_only": np.arange(n) >= len(pieces),
    }


def _with_profiles(
    columns: dict[str, np.ndarray],
    pieces: Sequence[Stamp],
    templates: Sequence[Stamp],
    inputs: MeasureInputs,
    settings: DetectionSettings,
) -> tuple[dict[str, np.ndarray], list[Stamp], float, float]:
    """Fit profiles to the sources that have data under their PSF; return the columns, one stamp a row, and
    the sky and its error.
    """
    coadd = inputs.coadd
    points = [coadd.point(*position) for position in zip(columns["y"], columns["x"], strict=True)]
    seen = np.array([(coadd.weight[p.slices] * p.array**2).sum() > 0.0 for p in points])
    unseen = [template for template, use in zip(templates, seen, strict=True) if not use]
    extent = _UNSEEN_EXTENT * coadd.fwhm_at(columns["y"], columns["x"])
    extent[: len(pieces)] = [math.sqrt(np.count_nonzero(piece.array) / math.pi) for piece in pieces]
    found = fit_sources(columns["y"][seen], columns["x"][seen], unseen, coadd, extent=extent[seen])
    # A source that the model merged with a galaxy shows only when the galaxy has a profile of its own.
    fitted = render([*found.stamps, *unseen], np.append(found.flux, found.other_flux), coadd.shape)
    late = _missed(fitted, coadd.without(found.sky), _doubtful(inputs, settings), settings)
    late = [point for point in late if _apart(point, found.y, found.x, coadd)]
    if late:
        more = _columns_of([], late, inputs)
        columns = {name: np.concatenate([values, more[name]]) for name, values in columns.items()}
        seen = np.append(seen, np.ones(len(late), dtype=bool))
        extent = np.append(extent, _UNSEEN_EXTENT * coadd.fwhm_at(more["y"], more["x"]))
        found = fit_sources(columns["y"][seen], columns["x"][seen], unseen, coadd, found, extent[seen])
    blended = JointFit.of([*templates, *late], coadd).correlation().max(axis=1).toarray().ravel() > BLEND
    # What is two points takes two rows.
    row = np.concatenate([np.flatnonzero(seen)[found.parent], np.flatnonzero(~seen)])
    pair = np.bincount(row)[row] > 1
    columns = {name: values[row] for name, values in columns.items()}
    for name in ("iyy", "ixx", "ixy"):
        columns[name][pair] = np.nan
    for name, values in (
        ("y", found.y),
        ("x", found.x),
        ("y_err", found.y_err),
        ("x_err", found.x_err),
        ("flux", np.append(found.flux, found.other_flux)),
        ("flux_err", np.append(found.error, found.other_error)),
        ("flux_template_err", found.shape_error),
        ("flux_confusion_err", found.confusion_error),
        ("flag_extended", found.extended),
    ):
        columns[name][: len(values)] = values
    columns["flag_blended"] = blended[row] | pair
    return columns, [*found.stamps, *unseen], found.sky, found.sky_error


def _places(y: np.ndarray, x: np.ndarray, fwhm: np.ndarray, inputs: MeasureInputs) -> dict[str, np.ndarray]:
    """Return positions on the grid of the tract, and where in the patch they are."""
    height, width = inputs.coadd.shape
    border = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x))
    y, x = y + inputs.origin[0], x + inputs.origin[1]
    rows, columns = inputs.inner
    inner = (y >= rows.start - 0.5) & (y < rows.stop - 0.5)
    inner &= (x >= columns.start - 0.5) & (x < columns.stop - 0.5)
    return {"y": y, "x": x, "flag_edge": border < 2.0 * fwhm, "is_patch_inner": inner}


def _table(columns: Mapping[str, np.ndarray]) -> Table:
    """Put columns in their order, with types, units and descriptions."""
    return Table(
        [
            Column(np.asarray(columns[name], dtype=dtype), name=name, unit=unit, description=text)
            for name, (dtype, unit, text) in _COLUMNS.items()
        ]
    )


def _apart(point: Stamp, y: np.ndarray, x: np.ndarray, coadd: Coadd) -> bool:
    """Return whether a point is another source, and not what the fit of one of some positions leaves."""
    own_y, own_x = centroid(point)
    distance = np.hypot(y - own_y, x - own_x).min(initial=np.inf)
    return bool(distance > _LEAST_DISTANCE * coadd.fwhm[coadd.cell(own_y, own_x)])


def _doubtful(inputs: MeasureInputs, settings: DetectionSettings) -> np.ndarray:
    """Return where what is left of the data may be the rest of an outlier: near one, and dark in x."""
    size = 2 * max(1, round(np.nanmedian(inputs.coadd.fwhm))) + 1
    model = np.where(np.isfinite(inputs.model), inputs.model, 0.0)
    near = scipy.ndimage.maximum_filter(inputs.clipped, size)
    return near & ~shown(model, inputs.target_sigma, inputs.coadd, settings)


def _missed(
    fitted: np.ndarray, coadd: Coadd, doubtful: np.ndarray, settings: DetectionSettings
) -> list[Stamp]:
    """Find point sources in what a fit leaves of the data (matched filter)."""
    error = 1.0 / np.sqrt(np.maximum(coadd.information, 1e-30))
    matched = np.maximum(coadd.matched, 1e-30)
    flux = coadd.correlate(coadd.weight * (coadd.image - fitted), power=1) / matched
    floor = settings.psf_error * np.abs(coadd.correlate(coadd.weight * fitted, power=1)) / matched
    fwhm = float(np.nanmedian(coadd.fwhm))
    size = 2 * max(1, round(fwhm)) + 1
    around = _around(flux, coadd.good, fwhm)
    significant = coadd.good & (flux - np.maximum(around, 0.0) >= settings.min_snr * np.hypot(error, floor))
    peaks = significant & (flux / error == scipy.ndimage.maximum_filter(flux / error, size))
    peaks &= ~doubtful
    peaks[[0, -1]], peaks[:, [0, -1]] = False, False
    y, x = np.nonzero(peaks)
    dy, dx = peak_offset(flux, y, x)
    return [coadd.point(*position) for position in zip(y + dy, x + dx, strict=True)]


def _faded(columns: Mapping[str, np.ndarray], settings: DetectionSettings) -> np.ndarray:
    """Return which sources have no light left above the sky and beside their neighbours, in either flux."""
    snr = [columns[name] / columns[f"{name}_err"] for name in ("flux", "psf_flux")]
    return np.fmax(*snr) < _LEAST_SHARE * settings.min_snr


def _around(image: np.ndarray, good: np.ndarray, fwhm: float) -> np.ndarray:
    """Return the mean of an image in a square ring around each pixel, where no light of a point source is."""
    sums = np.zeros((2, *image.shape))
    for radius, sign in zip(_RING, (-1.0, 1.0), strict=True):
        size = 2 * round(radius * fwhm) + 1
        for total, values in zip(sums, (np.where(good, image, 0.0), good.astype(float)), strict=True):
            total += sign * size**2 * scipy.ndimage.uniform_filter(values, size, mode="constant")
    return sums[0] / np.maximum(sums[1], 1.0)


def _core_flags(
    y: np.ndarray, x: np.ndarray, fwhm: np.ndarray, good: np.ndarray, planes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Look up the masks in the core of each source, within half a FWHM of its position."""
    none = np.zeros(good.shape, dtype=bool)
    saturated, clipped, prior = (planes.get(name, none) for name in ("SAT", "CLIPPED", "PRIOR_CARRIED"))
    flags = np.zeros((4, len(y)), dtype=bool)
    for k, (y0, x0, radius) in enumerate(zip(y, x, 0.5 * fwhm, strict=True)):
        box = tuple(slice(max(math.ceil(c - radius), 0), math.floor(c + radius) + 1) for c in (y0, x0))
        rows, columns = np.ogrid[box]
        core = np.hypot(rows[: good[box].shape[0]] - y0, columns[:, : good[box].shape[1]] - x0) <= radius
        pixels = [plane[box][core] for plane in (~good, saturated, clipped, prior)]
        flags[:, k] = [*(p.any() for p in pixels[:3]), 2 * pixels[3].sum() >= max(len(pixels[3]), 1)]
    names = ("flag_no_data", "flag_saturated", "flag_clipped", "flag_prior_carried")
    return dict(zip(names, flags, strict=True))


def _slopes(templates: Sequence[Stamp]) -> list[Stamp]:
    """Return the derivatives of templates along y and then along x."""
    return [slope(template, axis) for axis in (0, 1) for template in templates]
