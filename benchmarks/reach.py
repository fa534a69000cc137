# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What the standard family must reach, line by line, against what was measured."""

from __future__ import annotations

__all__ = ("make",)

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from methods import METHODS, OURS
from summary import MEASURES, Row, summarise

if TYPE_CHECKING:
    from report import Results

NOT_RUN = "not run"

_STARTS = tuple(name for name in OURS if METHODS[name].is_for("standard"))
"""The starts of this software."""

_PEERS = tuple(name for name, method in METHODS.items() if name not in OURS and method.whole)
"""Baselines that take the whole patch."""


def _number(rows: Sequence[Row], name: str) -> float:
    return summarise(rows, name)[0]


def _best_peer(results: Results, seeds: Sequence[int], name: str, *, any_setting: bool) -> tuple[float, str]:
    """Return the best number among the baselines, at chosen settings or at any, and whose it is."""
    sign = 1.0 if MEASURES[name].better == "high" else -1.0
    best, whose = math.nan, NOT_RUN
    for method in _PEERS:
        chosen = results.tuned(method)
        for setting in METHODS[method].grid if any_setting else () if chosen is None else (chosen,):
            rows = results.rows("standard", seeds, method, setting)
            number = _number(rows, name)
            if len(rows) == len(seeds) and not sign * number <= sign * best:
                best, whose = number, f"{METHODS[method].label} {setting}".strip()
    return best, whose


def _limit(number: float, whose: str, form: str) -> str:
    """Write a limit that follows from another method."""
    return f"{number:{form}} ({whose})" if math.isfinite(number) else NOT_RUN


def _verdict(margin: float, text: Callable[[float], str]) -> str:
    """Say whether a line is met; the margin is what is left to the limit, negative where it is missed."""
    return (
        "-"
        if not math.isfinite(margin)
        else "met"
        if margin >= 0.0
        else f"missed by {text(-margin).lstrip('+')}"
    )


def make(results: Results, seeds: Sequence[int]) -> str:
    """Write the lines as a Markdown table.

    Parameters
    ----------
    results : `report.Results`
        Where rows come from.
    seeds : `~collections.abc.Sequence` [`int`]
        Reported scenes of the standard family.

    Returns
    -------
    text : `str`
        Markdown; lines marked with a dagger may be missed by a stated amount.
    """
    rows = {name: results.rows("standard", seeds, name, "") for name in _STARTS}
    coadd = results.rows("standard", seeds, "coadd", "")
    columns = {name: _lines(results, seeds, rows[name], coadd) if rows[name] else [] for name in _STARTS}
    template = next((lines for lines in columns.values() if lines), _lines(results, seeds, [], coadd))
    text = "| line | limit | " + " | ".join(f"{METHODS[name].label} | verdict" for name in _STARTS) + " |\n"
    text += "| --- " * (2 + 2 * len(_STARTS)) + "|\n"
    for number, (title, limit, *_) in enumerate(template):
        cells: list[str] = []
        for name in _STARTS:
            cells += columns[name][number][2:] if columns[name] else [NOT_RUN, NOT_RUN]
        text += "| " + " | ".join([title, limit, *cells]) + " |\n"
    counts = {name: len(found) for name, found in rows.items() if 0 < len(found) < len(seeds)}
    for name, count in counts.items():
        text += f"\n{METHODS[name].label}: {count} of {len(seeds)} scenes so far.\n"
    text += "\nErrors are standard errors from the scatter of scenes or objects.\n"
    return text + "\n" + _starts(results, seeds, rows) + "\n" + _winners(results, seeds, rows)


def _lines(
    results: Results, seeds: Sequence[int], rows: Sequence[Row], coadd: Sequence[Row]
) -> list[tuple[str, str, str, str]]:
    """Return title, limit, number and verdict of every line."""
    lines = []

    def add(
        title: str, limit: str, name: str, margin: float, show: Callable[[float], str] | None = None
    ) -> None:
        number, error, n = summarise(rows, name) if rows else (math.nan, math.nan, 0)
        text = MEASURES[name].text
        shown = text(number) if math.isfinite(number) else NOT_RUN if not rows else "nothing to measure"
        if math.isfinite(error):
            shown += f" ± {text(error).lstrip('+')} (n = {n})"
        lines.append((title, limit, shown, _verdict(margin, text)))

    def value(name: str) -> float:
        return _number(rows, name) if rows else math.nan

    best, whose = _best_peer(results, seeds, "ssim", any_setting=True)
    add("SSIM", _limit(best + 0.05, f"{whose} + 0.05", ".3f"), "ssim", value("ssim") - best - 0.05)
    for name in ("psnr", "psnr_no_halo"):
        best, whose = _best_peer(results, seeds, name, any_setting=True)
        add(f"{MEASURES[name].title} †", _limit(best, whose, ".2f"), name, value(name) - best)
        peers = [
            _number(results.rows("standard", seeds, "richardson_lucy", s), name)
            for s in METHODS["richardson_lucy"].grid
        ]
        best = max((p for p in peers if math.isfinite(p)), default=math.nan)
        add(
            f"{MEASURES[name].title} over Richardson-Lucy †",
            _limit(best + 2.5, "its best + 2.5", ".2f"),
            name,
            value(name) - best - 2.5,
        )
    for name in ("sky_mean", "sky_error"):
        add(MEASURES[name].title, "±0.02", name, 0.02 - abs(value(name)))
    add("sky rms", "0.2", "sky_rms", 0.2 - value("sky_rms"))
    add("unmasked trail left over", "±0.1", "artifacts", 0.1 - abs(value("artifacts")))
    add("bright stars: size", "±1 %", "star_size", 0.01 - abs(value("star_size")))
    for name in ("star_e1", "star_e2"):
        add(f"bright stars: ellipticity {name[-2:]}, median", "±0.01", name, 0.01 - abs(value(name)))
    add(
        "bright stars: length of the ellipticity, with its noise",
        "0.01",
        "star_ellipticity",
        0.01 - value("star_ellipticity"),
    )
    add("bright stars: flux bias", "±0.2 %", "star_flux", 0.002 - abs(value("star_flux")))
    add("bright stars: flux rms †", "0.5 %", "star_flux_rms", 0.005 - value("star_flux_rms"))
    add(
        "galaxies 22-24: flux bias of the image",
        "±1 %",
        "galaxies_22_24",
        0.01 - abs(value("galaxies_22_24")),
    )
    add(
        "galaxies 24-25.5: flux bias of the image",
        "-20 %",
        "galaxies_24_25.5",
        0.2 + value("galaxies_24_25.5"),
    )
    name = "catalogue_galaxies_24_25.5"
    add("galaxies 24-25.5: flux bias of the source list", "±5 %", name, 0.05 - abs(value(name)))
    name = "with_residual_galaxies_24_25.5"
    add("galaxies 24-25.5: flux bias of model plus residual", "±5 %", name, 0.05 - abs(value(name)))
    plain = _number(coadd, "completeness") if coadd else math.nan
    best, whose = _best_peer(results, seeds, "completeness", any_setting=False)
    for name in ("completeness", "catalogue_completeness"):
        title = MEASURES[name].title
        add(f"{title} †", _limit(plain + 0.1, "coadd + 0.1", ".3f"), name, value(name) - plain - 0.1)
        add(f"{title} against baselines †", _limit(best, whose, ".3f"), name, value(name) - best)
    best, whose = _best_peer(results, seeds, "nrmse", any_setting=False)
    add("linear NRMSE †", _limit(best, whose, ".3f"), "nrmse", best - value("nrmse"))
    return lines


def _starts(results: Results, seeds: Sequence[int], rows: dict[str, list[Row]]) -> str:
    """Compare the two starts."""
    scratch, pretrained = (rows[name] for name in ("scratch", "pretrained"))
    if not scratch or not pretrained:
        return f"Pretrained start against scratch: {NOT_RUN}.\n"
    text = [
        "| pretrained minus scratch | limit | measured | verdict | differences of single scenes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, limit in (("psnr", 0.2), ("galaxies_24_25.5", 0.05), ("completeness", 0.02)):
        measure = MEASURES[name]
        # Better than scratch is no miss, except for a bias, where the distance from zero counts.
        change = _number(pretrained, name) - _number(scratch, name)
        loss = (
            -change
            if measure.better == "high"
            else abs(_number(pretrained, name)) - abs(_number(scratch, name))
        )
        limit_text, verdict = measure.text(limit).lstrip("+"), _verdict(limit - loss, measure.text)
        text.append(
            f"| {measure.title} | {limit_text} | {measure.text(change)} | {verdict} | "
            f"{_by_scene(scratch, pretrained, name)} |"
        )
    times = [statistics.median(row["run"]["seconds"] for row in found) for found in (pretrained, scratch)]
    share = times[0] / times[1]
    text.append(f"| time | 0.1 | {share:.3f} | {_verdict(0.1 - share, lambda m: f'{m:.3f}')} | |")
    note = "\nJudged is the difference of the medians; that of single scenes has less noise.\n"
    return "\n".join(text) + "\n" + note


def _by_scene(scratch: Sequence[Row], pretrained: Sequence[Row], name: str) -> str:
    """Return the median and the mean of the differences between the starts in the same scene."""
    measure = MEASURES[name]
    if measure.how != "median":
        return ""
    source = measure.source
    first = {row["seed"]: row[source] for row in scratch if row.get(source) is not None}
    second = {row["seed"]: row[source] for row in pretrained if row.get(source) is not None}
    changes = [second[seed] - first[seed] for seed in first.keys() & second.keys()]
    if len(changes) < 2:
        return ""
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    median, mean = (measure.text(value) for value in (statistics.median(changes), statistics.fmean(changes)))
    return f"median {median}, mean {mean} ± {measure.text(error).lstrip('+')} (n = {len(changes)})"


def _whole_rows(results: Results, seeds: Sequence[int], method: str) -> bool:
    """Return whether a baseline has a result at its chosen setting on every scene."""
    chosen = results.tuned(method)
    return chosen is not None and len(results.rows("standard", seeds, method, chosen)) == len(seeds)


def _winners(results: Results, seeds: Sequence[int], rows: dict[str, list[Row]]) -> str:
    """Say in words where a baseline at its chosen setting is better than this software."""
    text = []
    for name in _STARTS:
        if not rows[name]:
            continue
        lost = []
        run = [m for m in _PEERS if _whole_rows(results, seeds, m)]
        absent = [METHODS[method].label for method in _PEERS if method not in run]
        for measure in ("psnr", "psnr_no_halo", "ssim", "ssim_no_halo", "nrmse", "completeness", "pairs"):
            best, whose = _best_peer(results, seeds, measure, any_setting=False)
            number = _number(rows[name], measure)
            if (best > number) if MEASURES[measure].better == "high" else (best < number):
                show = MEASURES[measure].text
                lost.append(f"{MEASURES[measure].title} ({whose}: {show(best)}, here {show(number)})")
        where = "; ".join(lost) if lost else "none of PSNR, SSIM, NRMSE, completeness and pairs"
        left_out = f" Not run: {', '.join(absent)}." if absent else ""
        text.append(
            f"Baselines that are better than {METHODS[name].label}: {where if run else NOT_RUN}.{left_out}\n"
        )
    return "\n".join(text)
