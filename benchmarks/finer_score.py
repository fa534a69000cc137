# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Scenes that finer pixels are judged on, and the numbers that they are judged by."""

from __future__ import annotations

__all__ = ("FAMILIES", "MAGNITUDES", "NEAR", "Family", "do_scene")

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from astropy.table import Table

from lsst.coadd.deepprior.simulate import Scene, SceneConfig, add_glow
from lsst.coadd.deepprior.truth import AB_ZERO_POINT
from lsst.coadd.deepprior.warps import Warp

PIXEL = 0.2
"""Size of a pixel of the visits in arcsec."""

MAGNITUDES = (20.5, 21.5, 22.5, 23.5)
"""Magnitudes of the members of pairs and of the single stars, one a row."""

STEP = 24
"""Distance in pixels from one place to the next."""

NEAR = 0.12
"""Distance in arcsec from a member within which its peak or entry must be."""

_FIELD = SceneConfig(
    n_cells=(2, 2),
    cell_shape=(48, 48),
    n_visits=8,
    psf_size=31,
    n_trails=0,
    partial_fraction=0.0,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Scenes of one kind."""

    title: str
    config: SceneConfig
    separation: float | None = None
    """Separation of pairs in arcsec; without one the scenes have the population of the configuration."""
    glow: float = 0.0
    """Peak of a smooth glow in units of the sky noise of a visit."""
    target: float | None = None
    """FWHM of the target in arcsec, by default that of the task."""
    factors: tuple[int, ...] = (2,)
    """Oversampling with the pretrained start; from scratch it is 2."""
    scenes: tuple[int, int] = (1, 0)
    """Number of scenes with either start."""


FAMILIES = {
    "pairs": Family(
        'Pairs of 0.35", seeing 0.42" to 0.48", 8 dithered visits (Lanczos-resampled)',
        dataclasses.replace(_FIELD, seeing=(0.42, 0.48), noise_correlation="lanczos3"),
        separation=0.35,
        factors=(2, 3),
        scenes=(4, 1),
    ),
    "sharp": Family(
        'Pairs of 0.30", seeing 0.30" to 0.40" (1.5 to 2 pixels), 8 visits',
        dataclasses.replace(_FIELD, seeing=(0.30, 0.40)),
        separation=0.30,
        factors=(2, 3),
        scenes=(2, 1),
    ),
    "well_sampled": Family(
        'Stars and galaxies of the standard family, seeing 0.60" to 0.85", one target of 0.40"',
        dataclasses.replace(_FIELD, seeing=(0.60, 0.85), n_visits=12, n_trails=1, partial_fraction=0.25),
        target=0.40,
        scenes=(8, 1),
    ),
    "glow": Family(
        'Empty sky with a smooth glow, seeing 0.42" to 0.48"',
        dataclasses.replace(
            _FIELD, seeing=(0.42, 0.48), star_density=0.0, galaxy_density=0.0, pair_density=0.0
        ),
        glow=3.0,
        factors=(2, 3),
        scenes=(1, 1),
    ),
}


class PairScene(Scene):
    """A scene of close pairs and single stars on a coarse grid of places, at random phases and angles."""

    def __init__(self, config: SceneConfig, separation: float) -> None:
        super().__init__(config)
        rng = np.random.default_rng([config.seed, 8])
        box = self.patch.outer_bbox
        rows: list[tuple[float, float, float, int]] = []
        for i, j in np.ndindex(box.y.size // STEP, box.x.size // STEP):
            y, x = (
                start + STEP * (n + 0.5) + rng.uniform(-1.0, 1.0)
                for start, n in ((box.y.start, i), (box.x.start, j))
            )
            angle, mag = rng.uniform(0.0, np.pi), MAGNITUDES[i % len(MAGNITUDES)]
            if (i + j) % 4 == 0:
                rows.append((x, y, mag, -1))
                continue
            dx, dy = 0.5 * separation / PIXEL * np.array([np.cos(angle), np.sin(angle)])
            number = len(rows)
            rows += [(x + dx, y + dy, mag, number), (x - dx, y - dy, mag, number)]
        self._rows = Table(rows=rows, names=("x", "y", "mag", "pair_id"))
        self._rows["flux_nJy"] = 10.0 ** ((AB_ZERO_POINT - self._rows["mag"]) / 2.5)
        self._rows["type"] = "star"

    def catalogue(self, band: str) -> Table:
        """Return the stars, the same in each band."""
        return self._rows


def make_scene(family: Family, seed: int) -> tuple[Table, list[Warp], np.ndarray | None]:
    """Simulate a scene: its objects, its visits, and the glow on the pixels of the visits."""
    config = dataclasses.replace(family.config, seed=seed)
    scene = Scene(config) if family.separation is None else PairScene(config, family.separation)
    warps = [scene.warp(number, "i") for number in range(config.n_visits)]
    if not family.glow:
        return scene.catalogue("i"), warps, None
    noise = float(np.sqrt(np.nanmedian(warps[0].variance)))
    y, x = scene.patch.outer_bbox.y.center, scene.patch.outer_bbox.x.center
    warps, glow = add_glow(warps, family.glow * noise, (y + 3.3, x - 2.7), 40.0)
    return scene.catalogue("i"), warps, glow


def own_pixels(position: np.ndarray, oversampling: int) -> np.ndarray:
    """Return fine tract pixels in tract pixels of the visits."""
    return (np.asarray(position, dtype=float) - 0.5 * (oversampling - 1)) / oversampling


def find_peaks(image: np.ndarray, start: tuple[int, int], oversampling: int) -> np.ndarray:
    """Return the local maxima (y, x) of an image in tract pixels of the visits, to a fraction of a pixel."""
    from lsst.coadd.deepprior.moments import peak_offset

    highest = image == scipy.ndimage.maximum_filter(image, 3)
    highest[[0, -1]] = highest[:, [0, -1]] = False
    y, x = np.nonzero(highest & (image > 0.0))
    dy, dx = peak_offset(image, y, x)
    return np.column_stack(
        [own_pixels(p + oversampling * s, oversampling) for p, s in ((y + dy, start[0]), (x + dx, start[1]))]
    )


def is_split(members: np.ndarray, found: np.ndarray) -> bool:
    """Return whether both members (2, 2) of a pair have a position (n, 2) of their own, all as y, x."""
    if len(found) < 2:
        return False
    distance = PIXEL * np.hypot(*(found[:, None] - members[None]).transpose(2, 0, 1))
    nearest = distance.argmin(axis=0)
    return bool(nearest[0] != nearest[1] and distance[nearest, [0, 1]].max() < NEAR)


def shows_dip(
    image: np.ndarray, members: np.ndarray, start: tuple[int, int], oversampling: int, least: float = 0.05
) -> bool:
    """Return whether the image between the members of a pair is below the fainter one by a part at least."""
    t = np.linspace(-0.2, 1.2, 57)[:, None]
    line = oversampling * (members[0] + t * (members[1] - members[0]) - np.array(start))
    line += 0.5 * (oversampling - 1)
    values = scipy.ndimage.map_coordinates(image, line.T, order=3)
    return bool(values[20:37].min() < (1.0 - least) * min(values[:28].max(), values[28:].max()))


def pattern(image: np.ndarray, where: np.ndarray, oversampling: int) -> float:
    """Return the rms over the k x k phases of the mean of an image at a phase, less the mean of all.

    Blocks of k x k pixels with a pixel that is not to be used are left out.
    """
    k = oversampling
    ny, nx = (n // k for n in image.shape)
    blocks = image.reshape(ny, k, nx, k).transpose(0, 2, 1, 3).reshape(-1, k * k)
    used = where.reshape(ny, k, nx, k).all(axis=(1, 3)).ravel()
    return float(np.std(blocks[used].mean(axis=0)))


def interpolated(image: np.ndarray, oversampling: int) -> np.ndarray:
    """Return a spline of fifth order through an image: finer pixels that nothing was restored on."""
    zoomed = scipy.ndimage.zoom(image, oversampling, order=5, grid_mode=True, mode="nearest")
    return zoomed / oversampling**2


def over_pixels(image: np.ndarray, oversampling: int) -> np.ndarray:
    """Return the mean of a band-limited image over pixels, as the sum of k x k fine samples has it."""
    k = oversampling
    rows = []
    for n in image.shape:
        f = np.fft.fftfreq(n)
        below = np.where(f == 0.0, 1.0, k * np.sin(np.pi * f / k))
        rows.append(np.where(f == 0.0, 1.0, np.sin(np.pi * f) / below))
    padded = np.fft.fft2(image) * np.outer(*rows)
    return np.fft.ifft2(padded).real


def score_pairs(image: np.ndarray, truth: Table, start: tuple[int, int], oversampling: int) -> dict[str, Any]:
    """Return how many pairs an image splits, with their number, by magnitude."""
    peaks = find_peaks(image, start, oversampling)
    result: dict[str, Any] = {}
    for pair_id in sorted(set(truth["pair_id"]) - {-1}):
        rows = truth[truth["pair_id"] == pair_id]
        members = np.column_stack([rows["y"], rows["x"]]).astype(float)
        counts = result.setdefault(f"{rows['mag'][0]:.1f}", [0, 0])
        counts[0] += is_split(members, peaks) and shows_dip(image, members, start, oversampling)
        counts[1] += 1
    return result


def score_catalogue(sources: Table, truth: Table, oversampling: int) -> dict[str, Any]:
    """Return how many pairs a catalogue splits, and flux ratios of pairs and of single stars."""
    found = np.column_stack([own_pixels(sources[name], oversampling) for name in ("y", "x")])
    split: dict[str, Any] = {}
    fluxes: list[tuple[str, float, float]] = []
    for pair_id in sorted(set(truth["pair_id"])):
        groups = [truth[truth["pair_id"] == pair_id]]
        if pair_id == -1:
            groups = [truth[n : n + 1] for n in np.flatnonzero(truth["pair_id"] == -1)]
        for rows in groups:
            members = np.column_stack([rows["y"], rows["x"]]).astype(float)
            near = PIXEL * np.hypot(*(found - members.mean(axis=0)).T) < 0.8
            flux = float(sources["flux"][near].sum())
            error = float(np.sqrt((np.asarray(sources["flux_err"][near]) ** 2).sum()))
            total = float(rows["flux_nJy"].sum())
            fluxes.append(("single" if pair_id == -1 else "pair", flux / total, error / total))
            if pair_id != -1:
                counts = split.setdefault(f"{rows['mag'][0]:.1f}", [0, 0])
                counts[0] += is_split(members, found)
                counts[1] += 1
    return {"split": split, "fluxes": fluxes}


def score_match(sources: Table, normal: Table, oversampling: int) -> list[tuple[str, float, float]]:
    """Return the ratios of the fluxes of isolated sources to those on normal pixels, with their errors."""
    found = np.column_stack([own_pixels(sources[name], oversampling) for name in ("y", "x")])
    fluxes = []
    for row in normal[~(normal["flag_blended"] | normal["flag_edge"])]:
        distance = PIXEL * np.hypot(*(found - np.array([row["y"], row["x"]])).T)
        nearest = int(distance.argmin())
        if distance[nearest] < NEAR and not sources["flag_blended"][nearest]:
            kind = "extended" if row["flag_extended"] else "single"
            ratio = float(sources["flux"][nearest] / row["flux"])
            fluxes.append((kind, ratio, float(row["flux_err"] / row["flux"])))
    return fluxes


def run_task(warps: Sequence[Warp], oversampling: int, start: str, target: float | None) -> dict[str, Any]:
    """Restore the visits of a scene and measure its sources with the tasks and their defaults."""
    from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
    from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
    from lsst.coadd.deepprior.tasks.finer_deep_prior_coadd import (
        FinerDeepPriorCoaddConfig,
        FinerDeepPriorCoaddTask,
    )
    from lsst.coadd.deepprior.tasks.measure_deep_prior_coadd import MeasureDeepPriorCoaddTask

    settings: dict[str, Any] = {"init": start, "device": "cpu", "target_fwhm_arcsec": target}
    started = time.monotonic()
    if oversampling == 1:
        config = DeepPriorCoaddConfig()
        config.update(**settings)
        result = DeepPriorCoaddTask(config=config).run(warps=warps)
    else:
        finer = FinerDeepPriorCoaddConfig()
        finer.update(oversampling=oversampling, **settings)
        result = FinerDeepPriorCoaddTask(config=finer).run(warps=warps)
    seconds = time.monotonic() - started
    sources = MeasureDeepPriorCoaddTask().run(coadd=result.coadd, residual=result.residual).sources
    return {
        "image": result.coadd.image.array.astype(float),
        "draw": result.coadd.noise_realizations[0].array.astype(float),
        "residual": result.residual.image.array.astype(float),
        "noise": result.metrics["noise"]["coadd_sigma_nJy"],
        "sources": sources,
        "method": result.metrics["method"],
        "target": float(result.coadd.metadata["target_fwhm_arcsec"]),
        "seconds": seconds,
    }


def do_scene(name: str, seed: int, start: str) -> dict[str, Any]:
    """Restore a scene on normal and on finer pixels, and judge both."""
    family = FAMILIES[name]
    truth, warps, glow = make_scene(family, seed)
    box = warps[0].patch.outer_bbox
    corner = (box.y.start, box.x.start)
    rows: dict[str, Any] = {}
    factors = family.factors if start == "pretrained" else (2,)
    results = {k: run_task(warps, k, start, family.target) for k in (1, *factors)}
    normal = results[1]
    for k, result in results.items():
        image, noise = result["image"], result["noise"]
        row: dict[str, Any] = {
            "method": result["method"],
            "target": result["target"],
            "seconds": result["seconds"],
        }
        if family.separation is not None:
            row["image_split"] = score_pairs(image, truth, corner, k)
            row |= score_catalogue(result["sources"], truth, k)
        inside = np.zeros(image.shape, dtype=bool)
        inside[16 * k : -16 * k, 16 * k : -16 * k] = True
        dark = scipy.ndimage.maximum_filter(image, 8 * k + 1) < 0.5 * noise
        if glow is not None:
            dark = inside
            true = interpolated(glow, k)
            both = image + np.nan_to_num(result["residual"])
            row["glow_light"] = [float(one[inside].sum() / true[inside].sum()) for one in (image, both)]
        if k > 1:
            row["pattern_draw"] = pattern(result["draw"], dark, k) / noise
            if glow is not None:
                row["pattern_glow"] = pattern(image - true, inside, k) / noise
            if family.target is not None:
                same = over_pixels(normal["image"], k)
                ny, nx = same.shape
                binned = image.reshape(ny, k, nx, k).sum(axis=(1, 3))
                difference = (binned - same) / normal["noise"]
                lit = scipy.ndimage.maximum_filter(same > normal["noise"], 5)
                row["rms"] = [float(np.sqrt((difference[where] ** 2).mean())) for where in (lit, ~lit)]
                row["largest"] = float(np.abs(difference).max())
                row["lit_light"] = float(binned[lit].sum() / same[lit].sum())
                row["fluxes"] = score_match(result["sources"], normal["sources"], k)
            if family.separation is not None:
                rows[f"interpolated {k}"] = {
                    "image_split": score_pairs(interpolated(normal["image"], k), truth, corner, k)
                }
        rows[str(k)] = row
    return rows
