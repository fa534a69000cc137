# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What finer pixels gain: close pairs, fluxes, patterns, and the normal image again; writes
``finer_pixels.md``.

``python benchmarks/finer_pixels.py`` does all; ``--help`` tells how to do a part. `finer_score` makes the
scenes, restores and judges them. What was done is kept in ``benchmarks/.cache/finer_pixels`` and done again
only where code has changed.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import numpy as np
from cache import code_and_network, write_text
from finer_score import FAMILIES, MAGNITUDES, NEAR, do_scene

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "finer_pixels"
NOT_RUN = "not run"

FIRST_SEED = 700
"""First seed that is reported; others were used to choose settings."""

STARTS = ("pretrained", "scratch")


def row_path(name: str, seed: int, start: str) -> Path:
    """Return the file of the numbers of a scene."""
    code = code_and_network(
        ("finer_score", "finer_warps", "restore", "measure", "simulate", "weights", "coadd")
    )
    return CACHE / f"{name}-{seed}-{start}-{code}.json"


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


def _sum(rows: Iterable[dict[str, Any]], key: str) -> str:
    """Add up numbers of split pairs over scenes, by magnitude."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        for mag, (found, n) in row.get(key, {}).items():
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


def _values(rows: Iterable[dict[str, Any]], key: str, part: int | None = None) -> list[float]:
    """Return the numbers that rows have under a key, or a part of each."""
    return [row[key] if part is None else row[key][part] for row in rows if key in row]


def _median(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "-"
    spread = f" ({min(numbers):{form}} to {max(numbers):{form}})" if len(numbers) > 1 else ""
    return f"{statistics.median(numbers):{form}}{spread}"


def _fluxes(rows: Iterable[dict[str, Any]], kind: str, largest: float) -> str:
    """Return the median of flux ratios with its error, of those with an error below a limit."""
    pairs = [
        (ratio, error)
        for row in rows
        for what, ratio, error in row.get("fluxes", [])
        if what == kind and 0.0 < error < largest
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
        "Written by `python benchmarks/finer_pixels.py`; do not edit. Scenes of 96x96 pixels of 0.2 arcsec, "
        f"from seed {FIRST_SEED} on, restored and measured by the tasks with their defaults.",
        f"A pair is *split* by an image that has a peak within {NEAR} arcsec of each member and at least 5 % "
        "less between them, and by a catalogue that has an entry at each.",
        "*Interpolated* is a spline through the image of normal pixels.",
        "Fluxes are medians of the catalogue's over the true ones, of sources with errors below 2 %; in the "
        "family well_sampled, over those on normal pixels, with errors below 5 %.",
        "Noise is that of the coadd, in the same pixels. Other numbers are medians of scenes, in brackets "
        "the range.",
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
            if family.separation is not None:
                heads = " | ".join(f"{mag} mag" for mag in MAGNITUDES)
                text += [
                    f"| split pairs | by | {heads} |",
                    "|---" * (2 + len(MAGNITUDES)) + "|",
                ]
                for k in kinds:
                    text.append(f"| {_label(k)} | image | {_sum(by_kind[k], 'image_split')} |")
                    if " " not in k:
                        text.append(f"| | catalogue | {_sum(by_kind[k], 'split')} |")
                text.append("")
            own = [k for k in kinds if " " not in k]
            text += [
                "| | method | target FWHM | flux of stars | of pairs | of galaxies | seconds |",
                "|---|---|---|---|---|---|---|",
            ]
            for k in own:
                made = "; ".join(sorted({row["method"] for row in by_kind[k]}))
                target, seconds = (
                    _median(_values(by_kind[k], key), form)
                    for key, form in (("target", ".3f"), ("seconds", ".0f"))
                )
                largest = 0.02 if family.target is None else 0.05
                cells = [_fluxes(by_kind[k], kind, largest) for kind in ("single", "pair", "extended")]
                text.append(f"| {_label(k)} | {made} | {target} | {' | '.join(cells)} | {seconds} |")
            text += ["", "| | limit | " + " | ".join(_label(k) for k in own) + " |"]
            text += ["|---|---" + "|---" * len(own) + "|"]
            lines: list[tuple[str, str, str, str, int | None]] = [
                ("pattern of a noise realisation in the sky / noise", "1 %", ".2%", "pattern_draw", None)
            ]
            if family.glow:
                lines += [
                    ("pattern on the glow / noise", "1 %", ".2%", "pattern_glow", None),
                    ("part of the glow's light in the image", "", ".1%", "glow_light", 0),
                    ("the same, image and residual", "", ".1%", "glow_light", 1),
                ]
            if family.target is not None:
                lines += [
                    ("rebinned - normal where it is lit, rms / noise", "", ".2f", "rms", 0),
                    ("rebinned - normal in the sky, rms / noise", "", ".3f", "rms", 1),
                    ("rebinned - normal, largest / noise", "", ".1f", "largest", None),
                    ("light where it is lit, rebinned / normal", "", ".2%", "lit_light", None),
                ]
            for title, limit, form, key, part in lines:
                cells = [_median(_values(by_kind[k], key, part), form) for k in own]
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
