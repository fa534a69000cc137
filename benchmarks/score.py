# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""All numbers of one image of a scene: a row of the benchmark."""

from __future__ import annotations

__all__ = ("score_output",)

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import galsim
import metrics
import numpy as np
from scenes import CUTOUT, TARGET_SIGMA, BenchScene
from simulation import GLOW_FWHM
from sky import Sky, cropped, sky_of

from lsst.coadd.deepprior.evaluate import Detections, match, split_pairs
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.truth import GALSIM, galaxy_profile

HALO_MAG, HALO_ARCSEC = 19.5, 3.0
"""Stars brighter than this, and the radius around them that the halo-masked PSNR and SSIM leave out."""

MATCH_ARCSEC = 0.3
"""Largest distance of an entry of a list from its true object."""

EDGE_ARCSEC = 1.0
"""Width of the border in which nothing is looked for: light of objects outside peaks there."""

BRIGHT_SNR, FOUND_SNR, PAIR_SNR = 100.0, 5.0, 10.0
"""S/N in the coadd of stars that are measured, of objects that should be found, of members of pairs."""

GALAXIES = {"galaxies_22_24": (22.0, 24.0), "galaxies_24_25.5": (24.0, 25.5)}
"""Magnitudes of the galaxies whose fluxes are compared."""

APERTURE_ARCSEC = 1.5
"""Radius in which fluxes are compared."""

_STAMP = 21
"""Width in pixels of the cutouts of objects: the aperture and a margin."""

_RING = (5.0 * TARGET_SIGMA, 15.0)
"""Inner and outer radius in pixels in which rings are looked for: beyond the core of the target PSF."""

_RING_PEAK, _RING_NOISE = 0.01, 3.0
"""A ring is a deviation above this part of the peak of its star and this number of noises of the coadd."""

_NEIGHBOUR = 5.0
"""Radius in pixels around other objects of S/N above 5 that is left out where rings are looked for."""


def _positions(scene: BenchScene) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the true objects in array coordinates."""
    return (
        np.asarray(scene.catalogue["x"], dtype=float) - scene.start[1],
        np.asarray(scene.catalogue["y"], dtype=float) - scene.start[0],
    )


def _groups(scene: BenchScene, sky: Sky) -> dict[str, np.ndarray]:
    """Choose the objects whose fluxes are compared, (object,) bool."""
    star, mag = np.asarray(scene.catalogue["type"]) == "star", np.asarray(scene.catalogue["mag"])
    usable = sky.isolated & (sky.snr > 0.0)
    return {
        "stars": star & usable & (sky.snr > BRIGHT_SNR),
        **{name: ~star & usable & (mag > low) & (mag <= high) for name, (low, high) in GALAXIES.items()},
    }


def _inside(scene: BenchScene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tell which array positions are not close to the border of the patch."""
    ny, nx = scene.layout.shape
    edge = EDGE_ARCSEC / scene.pixel_scale
    return (x >= edge) & (x <= nx - 1 - edge) & (y >= edge) & (y <= ny - 1 - edge)


def _found(scene: BenchScene, sky: Sky, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Count what a ranked list of array positions holds down to 95 % purity."""
    true_x, true_y = _positions(scene)
    entries = _inside(scene, x, y)
    x, y = x[entries], y[entries]
    index = metrics.match_by_rank(x, y, true_x, true_y, MATCH_ARCSEC / scene.pixel_scale)
    found = metrics.found_at_purity(index, len(true_x))
    inside = _inside(scene, true_x, true_y)
    wanted = inside & (sky.snr > FOUND_SNR)
    pairs = split_pairs(np.where(found, 0, -1), scene.catalogue, inside & (sky.snr > PAIR_SNR))
    return {
        "completeness": float(found[wanted].mean()) if wanted.any() else None,
        "pairs_split": [bool(split) for split in pairs],
    }


def score_image(
    scene: BenchScene, sky: Sky, image: np.ndarray, psf: np.ndarray, *, own_resolution: bool = False
) -> dict[str, Any]:
    """Compare an image with the truth.

    Parameters
    ----------
    scene : `BenchScene`
        The scene.
    sky : `Sky`
        What its coadd shows.
    image : `numpy.ndarray`, (y, x)
        Image in nJy; where it has no number it is taken as 0.
    psf : `numpy.ndarray`, (k, k)
        Stamp of its PSF. Peaks are looked for with this as the filter and without a filter, and the better of
        the two results counts: a filter suits images with white noise, and costs close pairs in others.
    own_resolution : `bool`
        Compare with what the inverse-variance coadd shows of the truth, instead of the truth at the target
        PSF.

    Returns
    -------
    row : `dict`
        Numbers, and lists of one number an object; `None` where there is nothing to measure.
    """
    truth = sky.coadd_truth if own_resolution else scene.truth
    reference = sky.coadd_psf if own_resolution else gaussian_stamp(TARGET_SIGMA, 25)
    scale, where = scene.pixel_scale, sky.covered
    finite = np.isfinite(image)
    image = np.where(where, np.where(finite, image, 0.0), truth).astype(float)
    error = image - truth
    x, y = _positions(scene)
    stretched, goal = metrics.stretch(image, sky.noise), metrics.stretch(truth, sky.noise)
    data_range = float(goal[where].max()) or 1.0
    star, mag = np.asarray(scene.catalogue["type"]) == "star", np.asarray(scene.catalogue["mag"])
    halo = star & (mag < HALO_MAG)
    plain = where & ~metrics.near(truth.shape, x[halo], y[halo], HALO_ARCSEC / scale)
    row: dict[str, Any] = {
        "ssim": metrics.ssim(stretched, goal, data_range, where),
        "ssim_no_halo": metrics.ssim(stretched, goal, data_range, plain),
        "psnr": metrics.psnr(stretched, goal, data_range, where),
        "psnr_no_halo": metrics.psnr(stretched, goal, data_range, plain),
        "nrmse": metrics.nrmse(image, truth, where),
        "not_finite": float(1.0 - finite[where].mean()),
        "sky_mean": _mean(image, sky) / sky.noise,
        "sky_truth": _mean(truth, sky) / sky.noise,
        "sky_error": _mean(error, sky) / sky.noise,
        "sky_rms": float(image[sky.blank].std()) / sky.noise if sky.blank.any() else None,
        "blank_share": float(sky.blank[where].mean()),
    }
    excess = metrics.left_over(error / sky.noise, scene.artifacts.any(axis=0), sky.blank)
    row["artifacts"], row["artifact_pixels"] = excess.value, excess.n_pixels

    groups = _groups(scene, sky)
    profile: galsim.GSObject = galsim.Gaussian(sigma=TARGET_SIGMA * scale, gsparams=GALSIM)
    if own_resolution:
        profile = galsim.InterpolatedImage(galsim.Image(reference.astype(float)), scale=scale, flux=1.0)
    for name, chosen in groups.items():
        cutouts = [_cutout(scene, error, profile, index) for index in np.flatnonzero(chosen).tolist()]
        radius = APERTURE_ARCSEC / scale
        row[f"flux_{name}"] = [metrics.aperture_ratio(*cutout, radius) for cutout in cutouts]
        if name == "stars":
            shapes = [metrics.star_shape(*cutout, reference) for cutout in cutouts]
            for place, measure in enumerate(("star_size", "star_e1", "star_e2")):
                row[measure] = [shape[place] for shape in shapes]
            row["star_ellipticity"] = [math.hypot(e1, e2) for _, e1, e2 in shapes]
    lists = [metrics.peaks(image, kernel, sky.relative_noise, where) for kernel in (psf, np.ones((1, 1)))]
    filtered, plain_peaks = (_found(scene, sky, *positions) for positions in lists)
    row |= {name: max(filtered[name], plain_peaks[name], key=_share) for name in filtered}
    layout = scene.layout
    borders = (
        [layout.height * i for i in range(1, layout.n_i)],
        [layout.width * j for j in range(1, layout.n_j)],
    )
    step, row["seam_ratio"] = metrics.seam(error, borders, sky.blank)
    row["seam"] = step / sky.noise
    row["rings"] = [
        _ring(scene, sky, error, truth, x, y, index) for index in np.flatnonzero(groups["stars"]).tolist()
    ]
    return {name: _json_number(value) for name, value in row.items()}


def _mean(image: np.ndarray, sky: Sky) -> float:
    return float(image[sky.blank].mean()) if sky.blank.any() else float("nan")


def _share(value: float | list[bool] | None) -> float:
    return sum(value) if isinstance(value, list) else value or 0.0


def _json_number(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by `None`, and leave it out of lists."""
    if isinstance(value, list):
        return [entry for entry in value if np.isfinite(entry)]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _cutout(
    scene: BenchScene, error: np.ndarray, profile: galsim.GSObject, index: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Cut out the error around an object; return it, the object alone, and its position in the cutout."""
    row = scene.catalogue[index]
    x, y = row["x"] - scene.start[1], row["y"] - scene.start[0]
    ix, iy, half = round(x), round(y), _STAMP // 2
    if row["type"] != "star":
        profile = galsim.Convolve(galaxy_profile(row), profile, gsparams=GALSIM)
    alone = profile.withFlux(row["flux_nJy"]).drawImage(
        nx=_STAMP,
        ny=_STAMP,
        scale=scene.pixel_scale,
        offset=(x - ix, y - iy),
        method="no_pixel",
        dtype=float,
    )
    cut = error[iy - half : iy + half + 1, ix - half : ix + half + 1]
    return cut, alone.array, x - ix + half, y - iy + half


def _ring(
    scene: BenchScene,
    sky: Sky,
    error: np.ndarray,
    truth: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    index: int,
) -> float:
    """Return the largest deviation around a star over the larger of 1 % of its peak and 3 noises."""
    others = (sky.snr > FOUND_SNR) & (np.arange(len(x)) != index)
    others &= np.hypot(x - x[index], y - y[index]) < _RING[1] + _NEIGHBOUR
    where = sky.covered & ~metrics.near(error.shape, x[others], y[others], _NEIGHBOUR)
    peak = truth[round(y[index]), round(x[index])]
    deviation = metrics.ring(error, x[index], y[index], *_RING, where)
    return deviation / max(_RING_PEAK * peak, _RING_NOISE * sky.noise)


def score_catalogue(
    scene: BenchScene, sky: Sky, x: np.ndarray, y: np.ndarray, flux: np.ndarray, flux_err: np.ndarray
) -> dict[str, Any]:
    """Compare a source list with the truth.

    Parameters
    ----------
    scene : `BenchScene`
        The scene.
    sky : `Sky`
        What its coadd shows.
    x, y : `numpy.ndarray`, (source,)
        Positions in tract pixels.
    flux, flux_err : `numpy.ndarray`, (source,)
        Fluxes and their errors in nJy; their ratio is the rank.

    Returns
    -------
    row : `dict`
        Numbers whose names begin with ``catalogue_``.
    """
    order = np.argsort(-flux / flux_err, kind="stable")
    entry = match(Detections(x, y, flux), scene.catalogue, MATCH_ARCSEC / scene.pixel_scale)
    true_flux = np.asarray(scene.catalogue["flux_nJy"])
    row = _found(scene, sky, x[order] - scene.start[1], y[order] - scene.start[0])
    for name, chosen in _groups(scene, sky).items():
        matched = np.flatnonzero(chosen & (entry >= 0))
        row[f"flux_{name}"] = (flux[entry[matched]] / true_flux[matched]).tolist()
        row[f"n_{name}"] = int(chosen.sum())
    return {f"catalogue_{name}": value for name, value in row.items()}


def _glow_flux(scene: BenchScene, sky: Sky, image: np.ndarray) -> float:
    """Return the flux in nJy within half the FWHM that a glow in the middle has or would have."""
    (ny, nx), radius = scene.layout.shape, 0.5 * GLOW_FWHM / scene.pixel_scale
    where = metrics.near((ny, nx), [(nx - 1) / 2], [(ny - 1) / 2], radius) & sky.covered
    return float(np.nan_to_num(image)[where].sum(dtype=float))


def score_output(
    scene_file: Path, output_file: Path, settings: Sequence[str], *, whole: bool, own_resolution: bool
) -> dict[str, Any]:
    """Score all images of a run.

    Parameters
    ----------
    scene_file, output_file : `pathlib.Path`
        Scene, and what `methods` made of it.
    settings : `~collections.abc.Sequence` [`str`]
        Settings of the run.
    whole : `bool`
        Whether the images show the whole patch, and not the cutout alone.
    own_resolution : `bool`
        Add a row ``own resolution``, in which the images are compared with the truth as the inverse-variance
        coadd shows it.

    Returns
    -------
    rows : `dict`
        A row by setting, with ``cutout``, the row of the cutout, in it; and ``run``, the numbers of the run.
    """
    scene = BenchScene.load(scene_file)
    sky = sky_of(scene)
    part = cropped(scene, sky, CUTOUT)
    with np.load(output_file) as file:
        arrays = dict(file)
    rows: dict[str, Any] = {"run": json.loads(str(arrays["numbers"]))}
    for number, setting in enumerate(settings):
        own = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{number}/")}
        cutout = score_image(*part, own["image"][CUTOUT], own["psf"])
        if not whole:
            rows[setting] = {**cutout, "cutout": cutout}
            continue
        row = score_image(scene, sky, own["image"], own["psf"]) | {"cutout": cutout}
        if "flux" in own:
            row |= score_catalogue(scene, sky, *(own[name] for name in ("x", "y", "flux", "flux_err")))
        if "model_plus_residual" in own:
            both = own["model_plus_residual"]
            with_residual = score_image(scene, sky, both, sky.coadd_psf, own_resolution=True)
            row |= {f"with_residual_{name}": with_residual[name] for name in row if name.startswith("flux_")}
            row["with_residual_glow"] = _glow_flux(scene, sky, both)
        row["glow"] = _glow_flux(scene, sky, own["image"])
        row["true_glow"] = _glow_flux(scene, sky, scene.truth)
        rows[setting] = row
        if own_resolution:
            rows["own resolution"] = score_image(scene, sky, own["image"], own["psf"], own_resolution=True)
    return rows
