# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Are PSFs that are wrong, or not known, learned from the visits? Writes ``psf_modes.md``.

``python benchmarks/psf_modes.py`` does all; ``--help`` tells how to do a part. What was done is kept in
``benchmarks/.cache/psf_modes`` and done again only where code has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import galsim
import numpy as np
import scipy.optimize
import torch
from cache import code_and_network, digest, write_text
from injection import read_warps
from scenes import BenchScene
from simulation import bench_scene

from lsst.coadd.deepprior.families import family_scene
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf import StarFit, fit_star, shift_stamp
from lsst.coadd.deepprior.psf_refinement import CorrectedObservations, PsfRefinement, refine_psfs
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.simulate import Scene
from lsst.coadd.deepprior.weights import packaged_network

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "psf_modes"

SEEDS = (401, 402, 403)
"""Seeds that are reported; scenes 101 to 105 and 201 to 203 were used to choose settings."""

SNR = 50.0
"""Least S/N in all visits of stars whose restored size is compared."""

_GUESS_ERROR = 0.15
"""Largest relative error of the guesses of the seeing."""

_SHEAR = 0.03


class Case(NamedTuple):
    """What is handed in for the PSFs of a scene."""

    text: str
    blind: bool
    target: tuple[float, float]
    """Largest error of the FWHM, relatively, and of a component of the ellipticity."""
    change: Callable[[galsim.GSObject, np.random.Generator], galsim.GSObject]


CASES = {
    "known": Case("right", False, (0.01, 0.005), lambda psf, rng: psf),
    "wide": Case("5 % too wide", False, (0.01, 0.005), lambda psf, rng: psf.dilate(1.05)),
    "elliptical": Case(
        "ellipticity off by 0.03", False, (0.01, 0.005), lambda psf, rng: psf.shear(e1=_SHEAR, e2=0.0)
    ),
    "blind": Case(
        "a guess of the seeing, off by up to 15 %",
        True,
        (0.02, 0.01),
        lambda psf, rng: psf.dilate(1.0 + rng.uniform(-_GUESS_ERROR, _GUESS_ERROR)),
    ),
}


def make_scene(seed: int, n_visits: int = 6) -> BenchScene:
    """Simulate a scene of the standard family with stars enough and fewer visits."""
    config = dataclasses.replace(
        family_scene("standard", seed), n_visits=n_visits, n_trails=1, star_density=40.0
    )
    return bench_scene(Scene(config))


def changed(visit: Observation, case: Case, rng: np.random.Generator) -> Observation:
    """Return a visit with the PSF of a case."""
    stamp = visit.psf[tuple(np.argwhere(visit.has_psf)[0])]
    k = stamp.shape[0]
    image = galsim.InterpolatedImage(galsim.Image(stamp.copy(), scale=1.0), x_interpolant="lanczos15")
    drawn = case.change(image, rng).drawImage(nx=k, ny=k, scale=1.0, method="no_pixel", dtype=float).array
    wrong = np.maximum(drawn, 0.0)
    if case.text == "right":
        wrong = stamp
    psf = np.where(visit.has_psf[:, :, None, None], wrong / wrong.sum(), np.nan)
    return dataclasses.replace(visit, psf=psf)


def _shape(psf: np.ndarray) -> StarFit:
    cells = np.argwhere(np.isfinite(psf).all(axis=(2, 3)))
    return fit_star(psf[tuple(cells[len(cells) // 2])], radius=9)


def star_sizes(scene: BenchScene, visits: Sequence[Observation]) -> list[float]:
    """Restore and return the sizes of bright stars that are alone, over that of the target PSF."""
    settings = RestoreSettings(n_variance_draws=1, check_psf=False)
    restoration = restore(visits, scene.layout, settings, network=packaged_network())
    information = sum(np.nansum(v.psf[0, 0] ** 2) / np.median(v.variance[v.good]) for v in scene.observations)
    advertised = fit_star(np.pad(restoration.target_psf, 4), radius=4).sigma
    x = np.asarray(scene.catalogue["x"]) - scene.start[1]
    y = np.asarray(scene.catalogue["y"]) - scene.start[0]
    flux = np.asarray(scene.catalogue["flux_nJy"])
    sizes = []
    for k in np.flatnonzero((scene.catalogue["type"] == "star") & (flux * np.sqrt(information) > SNR)):
        others = np.hypot(x - x[k], y - y[k]) < 10.0
        others[k] = False
        inside = all(12 < c < n - 12 for c, n in zip((y[k], x[k]), scene.layout.shape, strict=True))
        if inside and flux[others].sum() < 0.02 * flux[k] and _seen(scene, y[k], x[k]):
            sizes.append(fit_star(restoration.image, x=x[k], y=y[k], radius=4).sigma / advertised)
    return sizes


def _seen(scene: BenchScene, y: float, x: float) -> bool:
    """Tell whether the core of a star is good in most visits: it is not saturated."""
    good = [
        visit.good[
            max(round(y) - visit.origin[0] - 2, 0) : round(y) - visit.origin[0] + 3,
            max(round(x) - visit.origin[1] - 2, 0) : round(x) - visit.origin[1] + 3,
        ]
        for visit in scene.observations
    ]
    return float(np.mean([part.size > 0 and part.all() for part in good])) > 0.5


def judge(name: str, seed: int) -> dict[str, Any]:
    """Refine the PSFs of a scene, restore it with both, and compare."""
    case, scene = CASES[name], make_scene(seed)
    rng = np.random.default_rng([seed, 11])
    visits = [changed(visit, case, rng) for visit in scene.observations]
    started = time.monotonic()
    refinement = refine_psfs(visits, scene.layout, blind=case.blind)
    seconds = time.monotonic() - started
    row: dict[str, Any] = {
        "anchored": refinement.anchored,
        "stars": len(refinement.stars),
        "seconds": seconds,
    }
    for label, psfs in (("given", [v.psf for v in visits]), ("refined", refinement.stamps)):
        pairs = [(_shape(a), _shape(v.psf)) for a, v in zip(psfs, scene.observations, strict=True)]
        row[f"{label}_fwhm"] = [float(a.sigma / b.sigma - 1.0) for a, b in pairs]
        row[f"{label}_e"] = [float(max(abs(a.e1 - b.e1), abs(a.e2 - b.e2))) for a, b in pairs]
    row["given_sizes"] = star_sizes(scene, visits)
    row["refined_sizes"] = star_sizes(scene, CorrectedObservations(visits, refinement))
    return row


def left_out_residuals(paths: Sequence[Path], widening: float, blind: bool) -> dict[str, Any]:
    """Refine the PSFs of real warps without some of the stars, and fit the PSFs to those.

    Parameters
    ----------
    paths : `~collections.abc.Sequence` [`~pathlib.Path`]
        Warp files of one patch.
    widening : `float`
        By how much the PSFs that are handed in are made wider, relatively.
    blind : `bool`
        Whether only their FWHM is used.

    Returns
    -------
    row : `dict`
        Number of fits, and means of chi^2 per pixel and of the root of the summed squares of the residuals
        over the flux, with both PSFs. Every fit has its own flux, position and background.
    """
    visits, layout, _ = read_warps(paths)
    wider = Case("wider", blind, (0.0, 0.0), lambda psf, rng: psf.dilate(1.0 + widening))
    if widening:
        visits = [changed(visit, wider, np.random.default_rng(0)) for visit in visits]
    seeing = float(np.median([visit.seeing() for visit in visits]))
    stars = refine_psfs(visits, layout, blind=blind).stars
    given: list[tuple[float, float]] = []
    refined: list[tuple[float, float]] = []
    anchored = []
    # One star at a time, so that enough are left.
    for y, x in stars:
        masked = [_without(visit, y, x, 2.5 * seeing) for visit in visits]
        refinement: PsfRefinement = refine_psfs(masked, layout, blind=blind)
        anchored.append(refinement.anchored)
        for visit, stamps in zip(visits, refinement.stamps, strict=True):
            fits = [_fit(visit, psf, layout, y, x, round(2.0 * seeing)) for psf in (visit.psf, stamps)]
            if fits[0] is not None and fits[1] is not None:
                given.append(fits[0])
                refined.append(fits[1])
    return {
        "stars": len(stars),
        "anchored": int(np.sum(anchored)),
        "fits": len(given),
        "given": np.mean(given, axis=0).tolist(),
        "refined": np.mean(refined, axis=0).tolist(),
        "better": float(np.mean([b[0] < a[0] for a, b in zip(given, refined, strict=True)])),
    }


def _without(visit: Observation, y: float, x: float, radius: float) -> Observation:
    """Mask a disc."""
    rows, columns = np.indices(visit.flux.shape)
    far = np.hypot(rows + visit.origin[0] - y, columns + visit.origin[1] - x) > radius
    return dataclasses.replace(visit, good=visit.good & far)


def _fit(
    visit: Observation, psf: np.ndarray, layout: CellLayout, y: float, x: float, radius: int
) -> tuple[float, float] | None:
    """Fit a PSF to a star; return chi^2 per pixel and the relative residual, `None` at the border."""
    iy, ix, half = round(y), round(x), psf.shape[-1] // 2
    row, column = iy - visit.origin[0], ix - visit.origin[1]
    ny, nx = visit.flux.shape
    if not (radius <= row < ny - radius and radius <= column < nx - radius):
        return None
    box = np.s_[row - radius : row + radius + 1, column - radius : column + radius + 1]
    good = visit.good[box] & (np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius)
    if good.sum() < 0.5 * good.size:
        return None
    values, noise = visit.flux[box][good].astype(float), np.sqrt(visit.variance[box][good].astype(float))
    stamp = psf[min(iy // layout.height, layout.n_i - 1), min(ix // layout.width, layout.n_j - 1)]
    inner = np.s_[half - radius : half + radius + 1, half - radius : half + radius + 1]

    def solved(place: np.ndarray) -> tuple[np.ndarray, float]:
        model = shift_stamp(stamp, *place)[inner][good]
        design = np.column_stack([model, np.ones_like(model)]) / noise[:, None]
        solution = np.linalg.lstsq(design, values / noise)[0]
        return values / noise - design @ solution, float(solution[0])

    best = scipy.optimize.least_squares(lambda place: solved(place)[0], [x - ix, y - iy]).x
    residual, flux = solved(best)
    return float(np.mean(residual**2)), float(np.sqrt(np.sum((residual * noise) ** 2)) / flux)


REAL = {
    "as delivered": (0.0, False),
    "5 % too wide": (0.05, False),
    "a guess of the seeing, 10 % too wide": (0.1, True),
}


def _row_file(name: str, key: Any) -> Path:
    return CACHE / f"{name}-{digest([key, code_and_network(('psf_modes',))])}.json"


def _done(path: Path, make: Callable[[], dict[str, Any]] | None) -> dict[str, Any] | None:
    """Return the row of a file, after making it if there is none; `None` for one that is not made."""
    if not path.is_file():
        if make is None:
            return None
        write_text(path, json.dumps(make()))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _largest(values: Sequence[float]) -> str:
    return f"{np.max(np.abs(values)):.4f}"


def _sizes(values: Sequence[float]) -> str:
    return f"{np.median(values):.4f} ({np.min(values):.3f} to {np.max(values):.3f})" if values else "no star"


def report(rows: dict[tuple[str, int], dict[str, Any]], real: dict[str, dict[str, Any] | None]) -> str:
    """Write the report in Markdown."""
    lines = [
        "# PSFs that are learned from the visits",
        "",
        "Made by `python benchmarks/psf_modes.py`. Scenes of the standard family, 256x256 pixels, with 6 "
        "visits, one satellite trail and 40 stars per square arcmin; errors are of a Gaussian fit to the "
        "PSF in the middle cell, against the true PSF, the largest of the visits; sizes: lone stars above "
        "S/N 50 on the restored image over that of the advertised PSF, median and range.",
        "",
        "| PSFs handed in | scene | stars | FWHM error, given | refined | target | e error, given | refined "
        "| target | star size, given | refined | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        for seed in SEEDS:
            row = rows.get((name, seed))
            if row is None:
                lines.append(f"| {case.text} | {seed} | not run |" + " |" * 9)
                continue
            stars = f"{row['stars']}" if row["anchored"] else "too few"
            cells = [case.text, str(seed), stars]
            for kind, target in zip(("fwhm", "e"), case.target, strict=True):
                cells += [_largest(row[f"given_{kind}"]), _largest(row[f"refined_{kind}"]), f"{target}"]
            cells += [_sizes(row["given_sizes"]), _sizes(row["refined_sizes"]), f"{row['seconds']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Real exposures",
        "",
        "Stars are left out one at a time; the PSFs learned from the others are fitted to them, with flux, "
        "position and background free. chi^2 is per pixel; the residual is the root of summed squares over "
        "the flux. PSFs as delivered may have been fitted to these very stars.",
        "",
        "| PSFs handed in | stars | anchored without one | fits | chi^2, given | refined | residual, given "
        "| refined | fits with less chi^2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in real.items():
        if row is None:
            lines.append(f"| {name} | not run |" + " |" * 7)
            continue
        numbers = [f"{row['given'][0]:.3f}", f"{row['refined'][0]:.3f}"]
        numbers += [f"{row['given'][1]:.4f}", f"{row['refined'][1]:.4f}", f"{100.0 * row['better']:.0f} %"]
        counts = [str(row[key]) for key in ("stars", "anchored", "fits")]
        lines.append("| " + " | ".join([name, *counts, *numbers]) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Scenes to do.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Case; all by default.")
@click.option(
    "--warps",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Warp file of one patch of real data; give the option once a file.",
)
@click.option(
    "--output",
    default=HERE / "psf_modes.md",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The report.",
)
def main(seeds: str, cases: tuple[str, ...], warps: tuple[Path, ...], output: Path) -> None:
    """Learn PSFs of simulated scenes and of real warps, compare, and write the report.

    The report holds all that was ever done with the present code.
    """
    torch.set_num_threads(1)
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in warps]
    for name, setting in REAL.items() if warps else ():
        row = _done(
            _row_file(f"real-{name.split()[0]}", content), lambda s=setting: left_out_residuals(warps, *s)
        )  # type: ignore[misc]
        write_text(
            CACHE / f"last-{name.split()[0]}.json",
            json.dumps([content, code_and_network(("psf_modes",)), row]),
        )
        click.echo(f"real, {name}: {row}")
    for seed in map(int, seeds.split(",")):
        for name in cases or CASES:
            row = _done(_row_file(f"{name}-{seed}", None), lambda n=name, s=seed: judge(n, s))  # type: ignore[misc]
            click.echo(f"{name} {seed}: {row}")
    rows = {
        (name, seed): row
        for name in CASES
        for seed in SEEDS
        if (row := _done(_row_file(f"{name}-{seed}", None), None)) is not None
    }
    real: dict[str, dict[str, Any] | None] = dict.fromkeys(REAL)
    for name in REAL:
        last = CACHE / f"last-{name.split()[0]}.json"
        if last.is_file():
            _, code, row = json.loads(last.read_text())
            real[name] = row if code == code_and_network(("psf_modes",)) else None
    write_text(output, report(rows, real))
    click.echo(f"{output} is written.")


if __name__ == "__main__":
    main()
