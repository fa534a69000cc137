# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What the products of a restored scene say of themselves, against the truth."""

from __future__ import annotations

__all__ = (
    "Products",
    "catalogue_of",
    "restore_scene",
    "score_pixels",
    "score_real_injection",
    "score_sources",
)

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import galsim
import metrics
import numpy as np
from astropy.table import Table
from injection import COMPANION_ARCSEC, COMPANION_SNR, disturbed, inject_into_warps, read_warps
from scenes import TARGET_SIGMA, BenchScene
from sky import Sky

from lsst.coadd.deepprior.deblend import DetectionSettings
from lsst.coadd.deepprior.evaluate import Detections, match
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.measure import MeasureInputs, measure_sources
from lsst.coadd.deepprior.moments import adaptive_moments
from lsst.coadd.deepprior.noise_correlation import noise_correlation
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.stamps import Stamp
from lsst.coadd.deepprior.truth import AB_ZERO_POINT, GALSIM, galaxy_profile
from lsst.coadd.deepprior.weights import packaged_network

MATCH_ARCSEC = 0.3
"""Largest distance of a catalogue entry from its true object."""

FALSE_FWHM = 0.5
"""Distance from the nearest true object, in FWHM of the coadd PSF, above which an entry is false."""

STRUCTURE = (0.2, 3.0)
"""True surface brightness, in units of the coadd's noise, in which the prior-carried mask is judged."""

BRIGHT_SNR = 100.0
"""S/N of sources whose sizes are compared."""

_COMPARED = ("flux", "flux_err", "psf_flux", "psf_flux_err", "x_err", "y_err")
"""Columns that are compared with the truth."""

_STAMP = 41
"""Width in pixels of the stamps on which true sizes are measured."""


@dataclasses.dataclass(frozen=True, eq=False)
class Products:
    """The arrays of a restoration that are judged (see `lsst.coadd.deepprior.restore.Restoration`)."""

    image: np.ndarray
    variance: np.ndarray
    coadd: np.ndarray
    residual: np.ndarray
    residual_variance: np.ndarray
    residual_psf: np.ndarray
    noise: np.ndarray
    residual_noise: np.ndarray
    clipped: np.ndarray
    prior_carried: np.ndarray

    def save(self, path: Path) -> None:
        """Write the arrays to a file."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path) -> Products:
        """Read them again."""
        with np.load(path) as file:
            return cls(**file)


def restore_scene(observations: Sequence[Observation], layout: CellLayout, n_variance_draws: int) -> Products:
    """Restore visits with the network of the package.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Their cells.
    n_variance_draws : `int`
        Noise realisations behind the variance plane.

    Returns
    -------
    products : `Products`
        What is judged.
    """
    settings = RestoreSettings(
        target_fwhm=TARGET_SIGMA * FWHM_PER_SIGMA, n_variance_draws=n_variance_draws, check_psf=False
    )
    result = restore(observations, layout, settings, network=packaged_network())
    return Products(
        image=result.image,
        variance=result.variance,
        coadd=result.coadd,
        residual=result.residual,
        residual_variance=result.residual_variance,
        residual_psf=result.residual_psf,
        noise=result.noise_realizations[0],
        residual_noise=result.residual_noise_realizations[0],
        clipped=result.clipped,
        prior_carried=result.prior_carried,
    )


def catalogue_of(products: Products, start: tuple[int, int]) -> tuple[Table, Coadd]:
    """Measure the sources of a restoration as `MeasureDeepPriorCoaddTask` does.

    Parameters
    ----------
    products : `Products`
        The restoration.
    start : `tuple` [`int`, `int`]
        Tract pixel (y, x) of the first pixel.

    Returns
    -------
    sources : `astropy.table.Table`
        The catalogue.
    plain : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd, with the correlation of its noise.
    """
    plain = Coadd(
        products.image,
        TARGET_SIGMA,
        products.residual,
        products.residual_variance,
        products.residual_psf,
    )
    noise = plain.carry(Stamp(0, 0, np.nan_to_num(products.noise))).array
    noise = (noise + np.nan_to_num(products.residual_noise)) / np.sqrt(
        np.where(plain.good, plain.variance, 1)
    )
    plain = plain.correlated(noise_correlation(noise, plain.good))
    ny, nx = products.image.shape
    inputs = MeasureInputs(
        model=products.image,
        model_variance=products.variance,
        target_sigma=TARGET_SIGMA,
        coadd=plain,
        planes={"CLIPPED": products.clipped, "PRIOR_CARRIED": products.prior_carried},
        origin=start,
        inner=(slice(start[0], start[0] + ny), slice(start[1], start[1] + nx)),
    )
    return measure_sources(inputs, lambda x, y: (x, y), DetectionSettings()), plain


def _size(moments: np.ndarray) -> float:
    """Return the size, in pixels, of second moments iyy and ixx."""
    return float(np.sqrt(0.5 * (moments[0] + moments[1])))


def _true_size(scene: BenchScene, row: Table.Row) -> float:
    """Return the size of an object by itself at the target PSF, as the catalogue measures it."""
    scale = scene.pixel_scale
    profile: galsim.GSObject = galsim.Gaussian(sigma=TARGET_SIGMA * scale, gsparams=GALSIM)
    if row["type"] != "star":
        profile = galsim.Convolve(galaxy_profile(row), profile, gsparams=GALSIM)
    image = profile.drawImage(nx=_STAMP, ny=_STAMP, scale=scale, method="no_pixel", dtype=float).array
    return _size(adaptive_moments(Stamp(0, 0, image), TARGET_SIGMA)[2:4])


def score_sources(scene: BenchScene, sky: Sky, sources: Table, plain: Coadd) -> dict[str, Any]:
    """Compare a catalogue with the true objects.

    Parameters
    ----------
    scene : `BenchScene`
        The scene.
    sky : `Sky`
        What its coadd shows.
    sources : `astropy.table.Table`
        The catalogue.
    plain : `~lsst.coadd.deepprior.plain_coadd.Coadd`
        The plain coadd.

    Returns
    -------
    row : `dict`
        ``objects``, one entry for each isolated object and each member of an undisturbed pair, and counts of
        entries that are false.
    """
    truth, scale = scene.catalogue, scene.pixel_scale
    names = ("x", "y", "ixx", "iyy", *_COMPARED)
    columns = {name: np.asarray(sources[name], dtype=float) for name in names}
    entry = match(Detections(columns["x"], columns["y"], columns["flux"]), truth, MATCH_ARCSEC / scale)
    x, y, flux = (np.asarray(truth[name], dtype=float) for name in ("x", "y", "flux_nJy"))
    pair = np.asarray(truth["pair_id"])
    near = np.hypot(x[:, None] - x, y[:, None] - y) * scale < COMPANION_ARCSEC
    lone = (near & (sky.snr > COMPANION_SNR) & ~np.eye(len(x), dtype=bool)).sum(axis=1) == 0
    objects = []
    for index in np.flatnonzero((sky.snr > 5.0) & (sky.isolated | (pair >= 0))).tolist():
        row, found = truth[index], int(entry[index])
        group = "isolated"
        if not sky.isolated[index]:
            others = pair != pair[index]
            if disturbed(x[index], y[index], flux[index], x[others], y[others], flux[others], scale).any():
                continue
            group = "blend"
        one: dict[str, Any] = {
            "group": group,
            "type": str(row["type"]),
            "pair": int(pair[index]),
            "mag": float(row["mag"]),
            "snr": float(sky.snr[index]),
            "true_flux": float(flux[index]),
            "lone": bool(lone[index]),
        }
        if found >= 0:
            one |= {name: float(columns[name][found]) for name in _COMPARED}
            one |= {"dx": float(columns["x"][found] - x[index]), "dy": float(columns["y"][found] - y[index])}
            if group == "isolated" and sky.snr[index] > BRIGHT_SNR:
                own = _size(np.array([columns["iyy"][found], columns["ixx"][found]]))
                ratio = own / _true_size(scene, row)
                one |= {"size_ratio": ratio} if np.isfinite(ratio) else {}
        objects.append(one)
    entries = columns["flux"] / columns["flux_err"] >= 5.0
    distance = np.hypot(columns["x"][:, None] - x, columns["y"][:, None] - y).min(axis=1, initial=np.inf)
    false = entries & (distance > FALSE_FWHM * np.nanmedian(plain.fwhm))
    return {
        "objects": objects,
        "n_entries": int(entries.sum()),
        "n_false": int(false.sum()),
        "noise_excess": plain.noise_excess(sky.coadd_psf),
    }


def score_pixels(scene: BenchScene, sky: Sky, products: Products) -> dict[str, Any]:
    """Compare realisation, variance plane and prior-carried mask with the true error.

    Parameters
    ----------
    scene : `BenchScene`
        The scene.
    sky : `Sky`
        What its coadd shows.
    products : `Products`
        The restoration.

    Returns
    -------
    row : `dict`
        Numbers in units of the coadd's noise, and counts of pixels.
    """
    error, noise, blank = products.image - scene.truth, products.noise, sky.blank
    known = sky.covered & np.isfinite(products.variance)
    x = np.asarray(scene.catalogue["x"]) - scene.start[1]
    y = np.asarray(scene.catalogue["y"]) - scene.start[0]
    star = np.asarray(scene.catalogue["type"]) == "star"
    row: dict[str, Any] = {}
    places = {"blank": blank & known}
    for name, kind in (("stars", star), ("galaxies", ~star)):
        bright = kind & (sky.snr > 20.0)
        places[name] = metrics.near(error.shape, x[bright], y[bright], 3.0) & known & ~blank
    for name, where in places.items():
        row[name] = {
            "error": float(np.sqrt(np.mean(error[where] ** 2))) / sky.noise,
            "realisation": float(np.sqrt(np.mean(noise[where] ** 2))) / sky.noise,
            "variance": float(np.sqrt(np.mean(products.variance[where]))) / sky.noise,
            "pull": float(1.4826 * np.median(np.abs(error[where]) / np.sqrt(products.variance[where]))),
        }
    row["lags_error"], row["lags_realisation"] = (_lags(image, places["blank"]) for image in (error, noise))
    deviation = np.abs(error) / np.sqrt(np.where(known, products.variance, np.inf))
    brightness = scene.truth / sky.noise
    structure = known & (brightness > STRUCTURE[0]) & (brightness < STRUCTURE[1])
    wrong, right = structure & (deviation > 5.0), known & (deviation < 3.0)
    carried = products.prior_carried
    row["mask"] = {
        "wrong": int(wrong.sum()),
        "wrong_flagged": int((wrong & carried).sum()),
        "right": int(right.sum()),
        "right_flagged": int((right & carried).sum()),
        "wrong_anywhere": int((known & (deviation > 5.0)).sum()),
    }
    row["sky_restored"] = float(error[places["blank"]].mean()) / sky.noise
    row["sky_coadd"] = float((products.coadd - sky.coadd_truth)[places["blank"]].mean()) / sky.noise
    return row


def _lags(image: np.ndarray, where: np.ndarray) -> list[float]:
    """Return the autocorrelations at 1 to 4 pixels along x and y, the mean of both."""
    image = np.where(where, image - image[where].mean(), 0.0)
    variance = (image[where] ** 2).mean()
    result = []
    for lag in (1, 2, 3, 4):
        pairs = [
            (image[here] * image[there])[where[here] & where[there]]
            for here, there in ((np.s_[:, lag:], np.s_[:, :-lag]), (np.s_[lag:], np.s_[:-lag]))
        ]
        result.append(float(np.concatenate(pairs).mean() / variance))
    return result


REAL_SNR = (10.0, 30.0, 100.0, 300.0)
"""S/N in the coadd of the stars that are injected into real warps."""

_REAL_PER_SNR = 8
"""Number of stars and of galaxies of each that are offered to an injection; those without a place are left
out."""


def score_real_injection(paths: Sequence[Path], seed: int) -> dict[str, Any]:
    """Inject objects into real warps, away from what is there, and measure them.

    Parameters
    ----------
    paths : `~collections.abc.Sequence` [`pathlib.Path`]
        Warp files of one patch.
    seed : `int`
        Seed of the positions and shapes.

    Returns
    -------
    row : `dict`
        ``objects`` as of `score_sources`.
    """
    visits, layout, scale = read_warps(paths)
    before, plain = catalogue_of(restore_scene(visits, layout, 1), (0, 0))
    point_error = float(np.median(plain.information[plain.good]) ** -0.5)
    rng = np.random.default_rng([seed, 8])
    rows = []
    x, y, flux = (np.asarray(before[name], dtype=float) for name in ("x", "y", "flux"))
    border = 4.0 / scale
    for snr in sorted(REAL_SNR, reverse=True):
        for kind in ("star", "galaxy") * _REAL_PER_SNR:
            wanted = snr * point_error
            for _ in range(200):
                at_x, at_y = (rng.uniform(border, n - border) for n in layout.shape[::-1])
                if (
                    not disturbed(at_x, at_y, wanted, x, y, flux, scale).any()
                    and plain.good[round(at_y), round(at_x)]
                ):
                    x, y, flux = np.append(x, at_x), np.append(y, at_y), np.append(flux, wanted)
                    hlr, axis_ratio, angle = rng.uniform((0.3, 0.4, 0.0), (0.7, 1.0, 180.0))
                    rows.append((kind, at_x, at_y, wanted, snr, hlr, axis_ratio, angle, 1.0))
                    break
    names = ("type", "x", "y", "flux_nJy", "snr", "hlr", "axis_ratio", "angle", "sersic_n")
    objects = Table(rows=rows, names=names)
    after, _ = catalogue_of(
        restore_scene(inject_into_warps(visits, objects, layout, scale), layout, 1), (0, 0)
    )
    columns = {name: np.asarray(after[name], dtype=float) for name in after.colnames}
    found = match(Detections(columns["x"], columns["y"], columns["flux"]), objects, MATCH_ARCSEC / scale)
    result = []
    for row, index in zip(objects, found.tolist(), strict=True):
        one = {
            "group": "isolated",
            "type": str(row["type"]),
            "mag": float(-2.5 * np.log10(row["flux_nJy"]) + AB_ZERO_POINT),
            "snr": float(row["snr"]),
            "true_flux": float(row["flux_nJy"]),
        }
        if index >= 0:
            one |= {name: float(columns[name][index]) for name in _COMPARED}
            one |= {
                "dx": float(columns["x"][index] - row["x"]),
                "dy": float(columns["y"][index] - row["y"]),
            }
        result.append(one)
    return {"objects": result}
