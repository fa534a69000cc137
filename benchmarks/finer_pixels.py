# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What finer pixels gain: close pairs, fluxes, patterns, and the normal image again; writes
``finer_pixels.md``.

``python benchmarks/finer_pixels.py`` does all; ``--help`` tells how to do a part. What was done is kept in
``benchmarks/.cache/finer_pixels`` and done again only where code has changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.ndimage
from astropy.table import Table
from cache import code_of, digest, write_text

from lsst.coadd.deepprior.simulate import Scene, SceneConfig, add_glow
from lsst.coadd.deepprior.truth import AB_ZERO_POINT
from lsst.coadd.deepprior.warps import Warp

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "finer_pixels"
NOT_RUN = "not run"

FIRST_SEED = 700
"""First seed that is reported; others were used to choose settings."""

STARTS = ("pretrained", "scratch")

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
        scenes=(4, 2),
    ),
    "sharp": Family(
        'Pairs of 0.30", seeing 0.30" to 0.40" (1.5 to 2 pixels), 8 visits',
        dataclasses.replace(_FIELD, seeing=(0.30, 0.40)),
        separation=0.30,
        factors=(2, 3),
        scenes=(3, 1),
    ),
    "well_sampled": Family(
        'Stars and galaxies of the standard family, seeing 0.60" to 0.85", one target of 0.40"',
        dataclasses.replace(_FIELD, seeing=(0.60, 0.85), n_visits=12, n_trails=1, partial_fraction=0.25),
        target=0.40,
        scenes=(3, 1),
    ),
    "glow": Family(
        'Empty sky with a smooth glow, seeing 0.42" to 0.48"',
        dataclasses.replace(
            _FIELD, seeing=(0.42, 0.48), star_density=0.0, galaxy_density=0.0, pair_density=0.0
        ),
        glow=3.0,
        factors=(2, 3),
        scenes=(2, 1),
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
    from lsst.coadd.deepprior.measure import peak_offset

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


def pattern(image: np.ndarray, oversampling: int) -> float:
    """Return the rms over the k x k phases of the mean of an image at a phase, less the mean of all."""
    phases = [image[dy::oversampling, dx::oversampling].mean() for dy, dx in np.ndindex((oversampling,) * 2)]
    return float(np.std(phases))


def interpolated(image: np.ndarray, oversampling: int) -> np.ndarray:
    """Return what finer pixels are without their own restoration: a spline of fifth order through an image."""
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


def run_task(warps: Sequence[Warp], oversampling: int, start: str, target: float | None) -> dict[str, Any]:
    """Restore the visits of a scene and measure its sources with the tasks and their defaults."""
    from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddConfig, DeepPriorCoaddTask
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
    normal = run_task(warps, 1, start, family.target)
    results = {1: normal} | {
        k: run_task(warps, k, start, family.target)
        for k in (family.factors if start == "pretrained" else (2,))
    }
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
        if k > 1:
            same = over_pixels(normal["image"], k)
            binned = image.reshape(same.shape[0], k, same.shape[1], k).sum(axis=(1, 3))
            data = [one["image"].sum() + np.nansum(one["residual"]) for one in (result, normal)]
            row["total"] = data[0] / data[1]
            row["pattern_draw"] = pattern(result["draw"], k) / noise
            if family.target is not None:
                difference = (binned - same) / normal["noise"]
                lit = scipy.ndimage.maximum_filter(same > normal["noise"], 5)
                row["rms"] = [float(np.sqrt((difference[where] ** 2).mean())) for where in (lit, ~lit)]
                row["largest"] = float(np.abs(difference).max())
                row["image_total"] = float(binned.sum() / same.sum())
            if glow is not None:
                inside = np.s_[16 * k : -16 * k, 16 * k : -16 * k]
                true = interpolated(glow, k)
                row["pattern_glow"] = pattern((image - true)[inside], k) / noise
                row["glow_flux"] = float(image[inside].sum() / true[inside].sum())
            if family.separation is not None:
                rows[f"interpolated {k}"] = {
                    "image_split": score_pairs(interpolated(normal["image"], k), truth, corner, k)
                }
        rows[str(k)] = row
    return rows


def row_path(name: str, seed: int, start: str) -> Path:
    """Return the file of the numbers of a scene."""
    code = code_of(("finer_pixels", "finer_warps", "restore", "measure", "simulate", "weights", "coadd"))
    return CACHE / f"{name}-{seed}-{start}-{digest(code)}.json"


def _do(name: str, seed: int, start: str) -> None:
    import torch

    torch.set_num_threads(1)
    write_text(row_path(name, seed, start), json.dumps(do_scene(name, seed, start)))


def plan(families: Sequence[str], scenes: int | None) -> list[tuple[str, int, str]]:
    """Return all scenes that are reported: family, seed and start."""
    return [
        (name, FIRST_SEED + n, start)
        for name in families
        for start, count in zip(STARTS, FAMILIES[name].scenes, strict=True)
        for n in range(count if scenes is None else min(scenes, count))
    ]


def _sum(rows: Iterable[dict[str, Any]], key: str, name: str) -> str:
    """Add up numbers of split pairs over scenes, all and by magnitude."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        for mag, (found, n) in row.get(key, {}).get(name, {}).items() if name else row.get(key, {}).items():
            total = counts.setdefault(mag, [0, 0])
            total[0] += found
            total[1] += n
    return " | ".join(
        f"{counts[f'{mag:.1f}'][0]}/{counts[f'{mag:.1f}'][1]}" if f"{mag:.1f}" in counts else "-"
        for mag in MAGNITUDES
    )


def _label(k: str) -> str:
    words = {"1": "normal pixels", "2": "pixels of 1/2", "3": "pixels of 1/3"}
    return f"normal pixels, interpolated to 1/{k.split()[1]}" if " " in k else words[k]


def _numbers(rows: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    found = (value(row) for row in rows)
    return [number for number in found if number is not None and math.isfinite(number)]


def _median(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "-"
    spread = f" ({min(numbers):{form}} to {max(numbers):{form}})" if len(numbers) > 1 else ""
    return f"{statistics.median(numbers):{form}}{spread}"


def _fluxes(rows: Iterable[dict[str, Any]], kind: str) -> str:
    """Return the weighted mean of flux ratios with its error, of those with an error below 2 %."""
    pairs = [
        (ratio, error)
        for row in rows
        for what, ratio, error in row.get("fluxes", [])
        if what == kind and 0.0 < error < 0.02
    ]
    if not pairs:
        return "-"
    ratios = np.array([ratio for ratio, _ in pairs])
    error = 1.2533 * ratios.std() / math.sqrt(len(ratios))
    return f"{100.0 * (np.median(ratios) - 1.0):+.2f} ± {100.0 * error:.2f} % (n = {len(ratios)})"


def report() -> str:
    """Write all that was measured with the present code as Markdown."""
    text = [
        "# Finer pixels: what they gain, and what they must not change",
        "",
        'Written by `python benchmarks/finer_pixels.py`; do not edit. Scenes of 96x96 pixels of 0.2", from seed '
        f"{FIRST_SEED} on, restored and measured by the tasks with their defaults. A pair is *split* by an image "
        f'that has a peak within {NEAR}" of each member and at least 5 % less between them, and by a catalogue '
        "that has an entry there. *Interpolated* is a spline through the image of normal pixels. Noise is that "
        "of the coadd, in the same pixels. Medians of scenes, in brackets the range.",
    ]
    for name, family in FAMILIES.items():
        text += ["", f"## {name}", "", f"{family.title}."]
        for start, count in zip(STARTS, family.scenes, strict=True):
            paths = [row_path(name, FIRST_SEED + n, start) for n in range(count)]
            scenes = [json.loads(path.read_text()) for path in paths if path.is_file()]
            text += ["", f"### {start} start, {len(scenes)} of {count} scenes", ""]
            if not scenes:
                text.append(NOT_RUN)
                continue
            kinds = sorted({k for scene in scenes for k in scene}, key=lambda k: (" " in k, k))
            by_kind = {k: [scene[k] for scene in scenes if k in scene] for k in kinds}
            made = sorted({row["method"] for k in kinds if " " not in k for row in by_kind[k]})
            text += [f"Method: {'; '.join(made)}.", ""]
            if family.separation is not None:
                heads = " | ".join(f"{mag} mag" for mag in MAGNITUDES)
                text += [
                    f"| split pairs | by | {heads} |",
                    "|---" * (2 + len(MAGNITUDES)) + "|",
                ]
                for k in kinds:
                    text.append(f"| {_label(k)} | image | {_sum(by_kind[k], 'image_split', '')} |")
                    if " " not in k:
                        text.append(f"| | catalogue | {_sum(by_kind[k], 'split', '')} |")
                text += [
                    "",
                    "| | target FWHM | flux of single stars | flux of pairs | seconds |",
                    "|---|---|---|---|---|",
                ]
                for k in kinds:
                    if " " not in k:
                        target, seconds = (
                            _median(_numbers(by_kind[k], lambda row, n=n: row[n]), form)
                            for n, form in (("target", ".3f"), ("seconds", ".0f"))
                        )
                        text.append(
                            f"| {_label(k)} | {target} | {_fluxes(by_kind[k], 'single')} | "
                            f"{_fluxes(by_kind[k], 'pair')} | {seconds} |"
                        )
                text.append("")
            text += ["| | limit | " + " | ".join(_label(k) for k in kinds if k in "23") + " |"]
            text += ["|---|---" + "|---" * sum(k in "23" for k in kinds) + "|"]
            lines: list[tuple[str, str, str, Callable[[dict[str, Any]], float | None]]] = [
                (
                    "light of image and residual, over that of normal pixels, - 1",
                    "0.5 %",
                    ".3%",
                    lambda row: row["total"] - 1.0,
                ),
                (
                    "pattern of a noise realisation / noise",
                    "1 %",
                    ".2%",
                    lambda row: row["pattern_draw"],
                ),
            ]
            if family.glow:
                lines += [
                    ("pattern on the glow / noise", "1 %", ".2%", lambda row: row["pattern_glow"]),
                    ("light of the glow in the image, - 1", "", ".2%", lambda row: row["glow_flux"] - 1.0),
                ]
            if family.target is not None:
                lines += [
                    ("rebinned - normal, sources, rms / noise", "", ".2f", lambda row: row["rms"][0]),
                    ("rebinned - normal, sky, rms / noise", "", ".3f", lambda row: row["rms"][1]),
                    ("rebinned - normal, largest / noise", "", ".1f", lambda row: row["largest"]),
                    (
                        "light of the image, rebinned / normal - 1",
                        "0.5 %",
                        ".2%",
                        lambda row: row["image_total"] - 1.0,
                    ),
                ]
            for title, limit, form, value in lines:
                cells = [_median(_numbers(by_kind[k], value), form) for k in kinds if k in "23"]
                text.append("| " + " | ".join([title, limit, *cells]) + " |")
    return "\n".join(text) + "\n"


@click.command()
@click.option(
    "--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Family; all by default."
)
@click.option("--scenes", default=None, type=click.IntRange(1), help="Scenes of each, if not all.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes at a time.")
@click.option(
    "--output",
    default=HERE / "finer_pixels.md",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The report.",
)
def main(families: tuple[str, ...], scenes: int | None, workers: int, output: Path) -> None:
    """Measure what finer pixels gain and what they must not change, and write the report."""
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [job for job in plan(families or tuple(FAMILIES), scenes) if not row_path(*job).is_file()]
    # The quick start first, and families in turns, so that an interrupted run has some of each.
    jobs.sort(key=lambda job: (job[2] == "scratch", job[1]))
    failures = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_do, *job): " ".join(map(str, job)) for job in jobs}
        for n, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if error is not None:
                failures.append(f"{futures[future]} failed: {error}")
            click.echo(f"[{n}/{len(futures)}] {futures[future]}: {'done' if error is None else 'FAILED'}")
            write_text(output, report())
    write_text(output, report())
    click.echo(f"{output} is written.")
    for failure in failures:
        click.echo(failure, err=True)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
