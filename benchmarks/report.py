# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The table of the benchmark as Markdown, from the rows of the runs alone."""

from __future__ import annotations

__all__ = ("Results", "make")

import dataclasses
import importlib.metadata
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import reach
from methods import METHODS, OURS
from scenes import CUTOUT
from simulation import GLOW
from summary import MEASURES, Row, summarise, worse

from lsst.coadd.deepprior.families import HELD_OUT

NOT_RUN = "not run"


class Results(Protocol):
    """Where rows come from."""

    def rows(self, family: str, seeds: Iterable[int], method: str, setting: str) -> list[Row]:
        """Return the rows of a setting of a method."""

    def tuned(self, method: str) -> str | None:
        """Return the chosen setting of a method, `None` if there is none yet."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of tables: a method at a setting."""

    label: str
    method: str
    setting: str


_TABLES = {
    "Image": ("psnr", "psnr_no_halo", "ssim", "ssim_no_halo", "nrmse"),
    "Sky and artifacts": (
        *("sky_mean", "sky_error", "sky_rms", "artifacts"),
        *("seam", "seam_ratio", "rings", "not_finite"),
    ),
    "Stars with S/N above 100": (
        *("star_size", "star_e1", "star_e2", "star_ellipticity", "star_flux", "star_flux_rms"),
    ),
    "Galaxies": ("galaxies_22_24", "galaxies_22_24_rms", "galaxies_24_25.5", "galaxies_24_25.5_rms"),
    "Detection": ("completeness", "pairs"),
}
_CATALOGUE = tuple(name for name in MEASURES if name.startswith("catalogue_"))

_FAULTS = ("seam", "seam_ratio", "rings")
_COMPARED = tuple(name for names in _TABLES.values() for name in names if name not in _FAULTS)
"""Measures in which no family may be worse than the coadd at its own resolution."""

_NOTES = """\
All images are compared with the true sky at the target PSF, a Gaussian of sigma 0.8 pixel; the line *own
resolution* compares the inverse-variance coadd with what it would show without noise. PSNR and SSIM (Wang
et al. 2004, window of sigma 1.5 pixel) are those of asinh(image / noise), with the noise of a pixel of the
coadd, and their range is the largest value of the stretched truth; *without halos* leaves out 3 arcsec
around stars brighter than 19.5 mag. NRMSE is the linear rms error over the rms of the truth. All that
concerns the sky is in units of the noise of the coadd, over pixels where all objects together, with wide
wings, put less than 0.05 of it (*sky mean* is the image, *minus truth* takes away the little light of
objects that is there). *Left of artifacts* is the mean error in pixels of unmasked trails and cosmic rays
on blank sky minus that around them. The step at cell borders is that of the error on blank sky, also over
the rms of the same steps at all other lines: noise alone gives 1, and a seam shows above 3. A ring is the
largest deviation of the mean profile, 4 to 15 pixels from a star, over the larger of 1 % of its peak and 3
noises; 1 is the limit. Stars and galaxies are those without a disturbing neighbour, the light of neighbours
is subtracted as it truly is, and fluxes are those within 1.5 arcsec over the true ones there: bias is the
median deviation of all objects of all scenes, rms their standard deviation (outliers included). Size and
ellipticity are of Gaussian fits, against the same fit of the PSF; e1 and e2 are medians over the stars, while
the length of the ellipticity of a star has the noise of that star in it. Completeness is the share of objects
of true S/N above 5 in the coadd that are among the peaks (local maxima, with the image's own PSF as filter or
without a filter, whichever is better), ranked by height, as far down as 95 % of the peaks have a true
object within 0.3 arcsec, one to one, and nothing within 1 arcsec of the border counts. Pairs are split if
both members are in that list (S/N above 10). Other numbers are medians of the scenes.
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _lines(results: Results, family: str = "standard", *, whole: bool = True) -> list[Line]:
    """List the lines of tables of a family: on the whole patch, or on the cutout."""
    lines = [Line("inverse-variance coadd, own resolution", "coadd", "own resolution")] if whole else []
    for name, method in METHODS.items():
        if not method.is_for(family) or (whole and not method.whole):
            continue
        setting = results.tuned(name)
        label = f"{method.label} ({setting})" if setting else method.label
        lines.append(Line(label, name, NOT_RUN if setting is None else setting))
        if name == "paper_form":
            late = method.grid[-1]
            lines.append(Line(f"{method.label}, stopped late ({late})", name, late))
    return lines


def _cutouts(results: Results, seeds: Sequence[int]) -> str:
    """Make the table of the cutout that all methods have."""
    names = ("psnr", "ssim", "nrmse", "sky_error", "sky_rms", "artifacts", "completeness")
    body = []
    for line in _lines(results, whole=False):
        rows = [row["cutout"] for row in results.rows("standard", seeds, line.method, line.setting)]
        body.append([_label(line, rows, seeds), *_cells(rows, names)])
    height, width = (part.stop - part.start for part in CUTOUT)
    return (
        f"STARRED sees {height}x{width} pixels in the middle of the patch; here all methods are compared "
        "there, at the settings chosen on whole patches (for STARRED, on cutouts).\n\n"
        + _table(["method", *(MEASURES[name].title for name in names)], body)
    )


def _cells(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return the numbers of some measures as text."""
    return [MEASURES[name].text(summarise(rows, name)[0]) if rows else NOT_RUN for name in names]


def _label(line: Line, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    partial = f" [{len(rows)} of {len(seeds)} scenes]" if 0 < len(rows) < len(seeds) else ""
    return line.label + partial


def _standard(results: Results, seeds: Sequence[int]) -> list[str]:
    """Make the tables of the standard family."""
    lines = _lines(results)
    rows = {line: results.rows("standard", seeds, line.method, line.setting) for line in lines}
    parts = []
    for title, names in _TABLES.items():
        header = ["method", *(MEASURES[name].title for name in names)]
        body = [[_label(line, rows[line], seeds), *_cells(rows[line], names)] for line in lines]
        parts.append(f"### {title}\n\n{_table(header, body)}")
    ours = [line for line in lines if line.method in OURS]
    header = ["catalogue, fitted to model and residual", *(line.label for line in ours)]
    body = [
        [MEASURES[name].title.removeprefix("catalogue: "), *(_cells(rows[line], [name])[0] for line in ours)]
        for name in _CATALOGUE
    ]
    parts.append(f"### Source list\n\n{_table(header, body)}")
    parts.append("### Cutouts\n\n" + _cutouts(results, seeds))
    parts.append("### Time and memory\n\n" + _cost(results, seeds))
    return parts


def _cost(results: Results, seeds: Sequence[int]) -> str:
    """Make the table of time and memory of runs of one setting."""
    body = []
    for line in _lines(results, whole=False):
        runs = [
            row["run"] for row in results.rows("standard", seeds, line.method, line.setting) if row["run"]
        ]
        if not runs:
            body.append([line.label, *[NOT_RUN] * 5])
            continue

        def median(name: str, runs: Sequence[Row] = runs) -> str:
            values = [run[name] for run in runs if run.get(name) is not None]
            return f"{statistics.median(values):.1f}" if values else "-"

        body.append(
            [
                line.label,
                *(
                    median(n)
                    for n in ("seconds", "seconds_with_noise", "cpu_seconds", "memory", "memory_before")
                ),
            ]
        )
    header = ["method", "seconds", "with noise realisations", "CPU seconds", "peak MiB", "MiB before the run"]
    return _table(header, body) + (
        "\nEach run has a process and one thread of its own; before the run, libraries and scene are in "
        "memory. Methods with a grid are timed at their chosen setting on one scene, others on all. The CPU "
        "seconds of this software include noise realisations and the source list.\n"
    )


def _grids(results: Results, seeds: Sequence[int], tuning: Sequence[int]) -> list[str]:
    """Make the tables of all settings that were tried."""
    parts = []
    for name, method in METHODS.items():
        if len(method.grid) == 1:
            continue
        body = []
        for setting in method.grid:
            cells = [
                cell
                for which in (tuning, seeds)
                for cell in _cells(results.rows("standard", which, name, setting), ("psnr", "ssim"))
            ]
            chosen = " (chosen)" if setting == results.tuned(name) else ""
            body.append([setting + chosen, *cells])
        header = ["setting", "PSNR, tuning", "SSIM, tuning", "PSNR, reported", "SSIM, reported"]
        parts.append(f"**{method.label}**\n\n{_table(header, body)}")
    return parts


def _family(results: Results, family: str, seeds: Sequence[int]) -> str:
    """Make the part of one of the other families."""
    coadd = results.rows(family, seeds, "coadd", "own resolution")
    lines = _lines(results, family)
    rows = {line: results.rows(family, seeds, line.method, line.setting) for line in lines}
    names = (
        *("psnr", "ssim", "nrmse", "sky_error", "sky_rms", "artifacts", "star_size", "star_flux"),
        *("galaxies_22_24", "galaxies_24_25.5", "completeness", "pairs", "seam_ratio", "rings", "not_finite"),
    )
    header = ["method", *(MEASURES[name].title for name in names)]
    body = [[_label(line, rows[line], seeds), *_cells(rows[line], names)] for line in lines]
    held_out = " (held out of the training of the network)" if family in HELD_OUT else ""
    text = [f"### {family}{held_out}\n\nScenes {', '.join(map(str, seeds))}.\n\n{_table(header, body)}"]
    for line in lines:
        if line.method in OURS:
            text.append(f"- {line.label}: {_against_coadd(rows[line], coadd)}")
    if family == "few_visits_1":
        text.append(f"- {_one_visit(rows)}")
    return "\n".join(text) + "\n"


def _against_coadd(rows: Sequence[Row], coadd: Sequence[Row]) -> str:
    """Say in which measures a restoration is worse than the coadd, and whether it has rings or seams."""
    if not rows or not coadd:
        return NOT_RUN + "."
    bad = []
    for name in _COMPARED:
        (number, error, _), (other, other_error, _) = summarise(rows, name), summarise(coadd, name)
        if worse(name, number, other):
            measure = MEASURES[name]
            small = abs(abs(number) - abs(other)) < math.hypot(error, other_error)
            scatter = ", within the errors" if small else ""
            both = f"with_residual_{name}"
            if both in MEASURES:
                scatter += f", model plus residual {measure.text(summarise(rows, both)[0])}"
            bad.append(f"{measure.title} {measure.text(number)} (coadd {measure.text(other)}{scatter})")
    text = (
        "worse than the coadd at its own resolution in " + "; ".join(bad)
        if bad
        else "nowhere worse than the coadd"
    )
    rings, seams = summarise(rows, "rings")[0], summarise(rows, "seam_ratio")[0]
    faults = [f"a ring of {rings:.2f} times the limit"] * (rings > 1.0) + [f"a seam ({seams:.1f})"] * (
        seams > 3.0
    )
    if any(row["not_finite"] for row in rows):
        faults.append("pixels that are not finite")
    return f"{text}. {'It has ' + ' and '.join(faults) if faults else 'No ring, no seam, all finite'}."


def _one_visit(rows: Mapping[Line, Sequence[Row]]) -> str:
    """Compare one visit with Richardson-Lucy on it."""
    by_method = {line.method: found for line, found in rows.items() if line.setting != "own resolution"}
    ours, peer = (by_method.get(name, []) for name in ("scratch", "richardson_lucy"))
    if not ours or not peer:
        return f"Against Richardson-Lucy on the one visit: {NOT_RUN}."
    text = []
    for name in ("psnr", "ssim", "nrmse", "completeness"):
        (number, *_), (other, *_) = summarise(ours, name), summarise(peer, name)
        verdict = "worse" if worse(name, number, other) else "not worse"
        measure = MEASURES[name]
        text.append(f"{measure.title} {measure.text(number)} against {measure.text(other)}, {verdict}")
    return "Scratch against Richardson-Lucy on the one visit: " + "; ".join(text) + "."


def _glow(results: Results, seeds: Sequence[int]) -> str:
    """Make the part of the faint extended source."""
    body = []
    for name in ("coadd", "richardson_lucy", "starlet", *OURS):
        if not METHODS[name].is_for(GLOW):
            continue
        setting = results.tuned(name) or ""
        pairs = [
            (results.rows(GLOW, [seed], name, setting), results.rows("empty", [seed], name, setting))
            for seed in seeds
        ]
        complete = [(with_glow[0], without[0]) for with_glow, without in pairs if with_glow and without]
        for key, label in (("glow", "image"), ("with_residual_glow", "model plus residual")):
            found = [(a, b) for a, b in complete if key in a]
            if key != "glow" and name not in OURS:
                continue
            if not found:
                body.append([f"{METHODS[name].label}, {label}", NOT_RUN, NOT_RUN])
                continue
            body.append(
                [
                    f"{METHODS[name].label}, {label}",
                    ", ".join(f"{(a[key] - b[key]) / a['true_glow']:.3f}" for a, b in found),
                    ", ".join(f"{a[key] / a['true_glow']:.3f}" for a, _ in found),
                ]
            )
    header = ["what", "(with glow - without) / true, each scene", "with glow / true"]
    return (
        "Flux within half the FWHM of a glow 20 arcsec wide (FWHM) and of S/N 3 in the area of a PSF, in an "
        "empty field. The first number compares the same field with and without it, so that noise and the "
        "unmasked trails cancel, which the second contains.\n\n" + _table(header, body)
    )


def _commit() -> str:
    """Return the commit of the source tree; ``-dirty`` follows where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def make(
    results: Results, seeds: Mapping[str, Sequence[int]], tuning: Sequence[int], versions: Mapping[str, str]
) -> str:
    """Write the table.

    Parameters
    ----------
    results : `Results`
        Where rows come from.
    seeds : `~collections.abc.Mapping`
        Reported scenes of each family.
    tuning : `~collections.abc.Sequence` [`int`]
        Scenes on which settings were chosen.
    versions : `~collections.abc.Mapping` [`str`, `str`]
        Digest of the code of each method.

    Returns
    -------
    text : `str`
        Markdown.
    """
    libraries = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scipy")
    )
    standard = seeds["standard"]
    parts = [
        "# Fidelity of the restored image and of other methods\n",
        f"Made by `python benchmarks/fidelity.py` with Python {platform.python_version()}, {libraries} on "
        f"{platform.machine()}, one thread a run, at commit {_commit()}. Settings were chosen on the scenes "
        f"{', '.join(map(str, tuning))} of the standard family (largest median PSNR); reported are its "
        f"scenes {', '.join(map(str, standard))}. What was not run with the present code says '{NOT_RUN}'.\n",
        "## What is to be reached, and what is\n",
        reach.make(results, standard),
        "## Standard family\n",
        *_standard(results, standard),
        "## Settings that were tried\n",
        *_grids(results, standard, tuning),
        "## Other families\n",
        *(
            _family(results, name, chosen)
            for name, chosen in seeds.items()
            if name not in ("standard", "empty", GLOW)
        ),
        "## Faint extended glow\n",
        _glow(results, seeds[GLOW]),
        "## How to read this\n",
        _NOTES,
        "## Versions of the code\n",
        _table(
            ["method", "digest of its modules, comments left out"],
            [[METHODS[name].label, f"`{version}`"] for name, version in versions.items()],
        ),
    ]
    return "\n".join(parts)
