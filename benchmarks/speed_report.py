# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The table of `speed`, from the files of what was measured."""

from __future__ import annotations

__all__ = ("make", "seconds_between")

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES, VISITS = (512, 1024, 3400), (8, 32, 128)
EXTRA = ((512, 16), (3400, 12), (3400, 100))
"""Patches of the targets."""

STARTS, DEVICES = ("pretrained", "scratch"), ("cpu", "cuda")
PHASES = ("read", "statistics", "base", "fit", "coadd", "noise", "psf", "write", "other")
PEERS = {
    "coadd": "inverse-variance coadd",
    "richardson_lucy": "Richardson-Lucy, 160 steps",
    "richardson_lucy_direct": "the same, each step with a pass over all visits",
    "starlet": "starlet-L1, 100 steps",
    "coadd_deconvolution": "deconvolution of the coadd (Rubin), 100 steps",
    "starred": "STARRED (a cutout of 128x128)",
}
NOT_RUN = "not run"


def seconds_between(begin: str, end: str) -> float:
    """Return the seconds between two times in ISO form."""
    first, last = (datetime.datetime.fromisoformat(time) for time in (begin, end))
    return (last - first).total_seconds()


class _Found:
    """What was measured with some version of the code."""

    def __init__(self, cache: Path, version: str) -> None:
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for path in sorted(cache.glob(f"*-{version}.json")):
            self._rows[tuple(path.stem.removesuffix(f"-{version}").split("-"))] = json.loads(path.read_text())

    def rows(self, *key: object) -> list[dict[str, Any]]:
        """Return the rows whose names begin with some parts."""
        wanted = tuple(map(str, key))
        return [row for name, row in self._rows.items() if name[: len(wanted)] == wanted]


def _median(rows: Sequence[dict[str, Any]], *names: str) -> float:
    values = []
    for row in rows:
        value: Any = row
        for name in names:
            value = value[name]
        values.append(value)
    return statistics.median(values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _quanta(found: _Found) -> list[str]:
    rows = []
    patches = sorted({*((size, n) for size in SIZES for n in VISITS), *EXTRA})
    for size, n_visits in patches:
        for start in STARTS:
            for device in DEVICES:
                measured = found.rows("quantum", size, n_visits, start, device)
                name = [str(size), str(n_visits), start, device]
                if not measured:
                    rows.append([*name, NOT_RUN, *[""] * (len(PHASES) + 7)])
                    continue
                total = _median(measured, "total")
                rows.append(
                    [
                        *name,
                        f"{total:.1f}",
                        *(f"{_median(measured, 'phases', phase):.1f}" for phase in PHASES),
                        f"{_median(measured, 'cpu'):.0f}",
                        f"{_median(measured, 'peak_gb'):.2f}",
                        f"{_median(measured, 'measure_cpu'):.0f}",
                        f"{_median(measured, 'measure_peak_gb'):.2f}",
                        f"{size**2 * n_visits / total / 1e6:.2f}",
                        f"{len(measured)}",
                        f"{_median(measured, 'load'):.1f}",
                    ]
                )
    head = ["size", "visits", "start", "device", "total s", *PHASES, "CPU s", "peak GB"]
    return _table([*head, "measuring CPU s", "peak GB", "Mpixel-visits/s", "runs", "load"], rows)


def _peers(found: _Found) -> list[str]:
    rows = []
    for size, n_visits in sorted({*((size, n) for size in SIZES for n in VISITS), *EXTRA}):
        ours = found.rows("quantum", size, n_visits, "pretrained", "cpu")
        for peer, label in PEERS.items():
            measured = found.rows("peer", size, n_visits, peer)
            if not measured:
                rows.append([str(size), str(n_visits), label, NOT_RUN, "", "", "", "", ""])
                continue
            total, cpu = _median(measured, "total"), _median(measured, "cpu")
            rows.append(
                [
                    *(str(size), str(n_visits), label, f"{total:.2f}", f"{cpu:.2f}"),
                    f"{_median(measured, 'peak_gb'):.2f}",
                    f"{_median(ours, 'total') / total:.2f}" if ours else NOT_RUN,
                    f"{_median(ours, 'cpu') / cpu:.2f}" if ours else NOT_RUN,
                    f"{_median(measured, 'load'):.1f}",
                ]
            )
    head = ["size", "visits", "method", "s", "CPU s", "peak GB", "pretrained quantum / it", "CPU s / CPU s"]
    return _table([*head, "load"], rows)


def _parts(found: _Found) -> list[str]:
    lines = []
    for device in DEVICES:
        measured = found.rows("parts", device)
        lines += [f"### {device}", ""]
        if not measured:
            lines += [NOT_RUN + ".", ""]
            continue
        part = measured[0]
        growth = part["growth"]
        lines += [
            "Exponents of the time of a step of maximum likelihood, which is a step between two passes: "
            f"{growth['visits']:+.3f} with the number of visits, {growth['area']:.3f} with the area, "
            f"{growth['psf']:.2f} with the width of the PSF stamps.",
            "",
        ]
        lines += _table(
            ["step", "ms"], [[name, f"{1e3 * value:.2f}"] for name, value in growth["step seconds"].items()]
        )
        lines += _table(
            ["kernel at 1024x1024 (phases)", "ms", "GFLOP/s", "GB/s"],
            [
                [name, f"{1e3 * row['seconds']:.1f}", f"{row['gflops']:.1f}", f"{row['gbytes']:.1f}"]
                for name, row in part["achieved"].items()
            ],
        )
    return lines


def _line(name: str, wanted: str, value: str, met: bool | None) -> list[str]:
    return [name, wanted, value, "-" if met is None else "yes" if met else "no"]


def _targets(found: _Found) -> list[str]:
    rows = []
    parts = found.rows("parts", "cpu")
    for name, wanted, key, centre, width in (
        ("growth of a step with visits, exponent", "0 within 0.05", "visits", 0.0, 0.05),
        ("growth of a step with area, exponent", "1 within 0.1", "area", 1.0, 0.1),
    ):
        value = parts[0]["growth"][key] if parts else None
        rows.append(
            _line(name, wanted, NOT_RUN, None)
            if value is None
            else _line(name, wanted, f"{value:.3f}", abs(value - centre) <= width)
        )
    small = found.rows("quantum", 512, 16, "pretrained", "cpu")
    name = "512x512, 16 visits, pretrained, 2 cores, Butler to Butler"
    if small:
        total = _median(small, "total")
        rows.append(_line(name, "at most 30 s", f"{total:.1f} s", total <= 30.0))
    else:
        rows.append(_line(name, "at most 30 s", NOT_RUN, None))
    for text, peer in (
        ("over Richardson-Lucy", "richardson_lucy"),
        ("over Richardson-Lucy that passes over the visits in each step", "richardson_lucy_direct"),
    ):
        lucy = found.rows("peer", 512, 16, peer)
        if not (small and lucy):
            rows.append(_line(f"{name}, {text}", "at most 2 times", NOT_RUN, None))
            continue
        ratio, cpu = (_median(small, key) / _median(lucy, key) for key in ("total", "cpu"))
        value = f"{ratio:.1f} times; {cpu:.1f} times in CPU s"
        rows.append(_line(f"{name}, {text}", "at most 2 times", value, ratio <= 2.0))
    large = found.rows("quantum", 3400, 12, "pretrained", "cpu")
    name = "3400x3400, 12 visits, pretrained, 2 cores"
    if large:
        total, peak = _median(large, "total") / 60.0, _median(large, "peak_gb")
        cpu = f"{_median(large, 'cpu') / 60.0:.1f} CPU min, load {_median(large, 'load'):.0f}"
        rows.append(_line(name, "at most 30 min", f"{total:.1f} min ({cpu})", total <= 30.0))
        rows.append(_line(f"{name}, peak", "below 10 GB", f"{peak:.1f} GB", peak < 10.0))
    else:
        rows.append(_line(name, "at most 30 min", NOT_RUN, None))
        rows.append(_line(f"{name}, peak", "below 10 GB", NOT_RUN, None))
    many = [*found.rows("quantum", 3400, 100, "pretrained", "cpu"), *found.rows("quantum", 3400, 128)]
    peak = f"{_median(many, 'peak_gb'):.1f} GB" if many else NOT_RUN
    met = _median(many, "peak_gb") < 10.0 if many else None
    rows.append(_line("the same with 100 visits or more, peak", "below 10 GB", peak, met))
    for start, limit in (("pretrained", 20.0), ("scratch", 120.0)):
        gpu = found.rows("quantum", 3400, 32, start, "cuda")
        name = f"3400x3400, 32 visits, {start}, GPU, without reading"
        if gpu:
            spent = _median(gpu, "total") - _median(gpu, "phases", "read")
            peak_gb = _median(gpu, "gpu_peak_gb")
            rows.append(_line(name, f"at most {limit:.0f} s", f"{spent:.1f} s", spent <= limit))
            rows.append(_line(f"{name}, its peak", "below 24 GB", f"{peak_gb:.1f} GB", peak_gb < 24.0))
        else:
            rows.append(_line(name, f"at most {limit:.0f} s", NOT_RUN, None))
            rows.append(_line(f"{name}, its peak", "below 24 GB", NOT_RUN, None))
    rows += _first_pass(found, parts)
    if parts:
        ratio = parts[0]["start-up"]["ours"] / parts[0]["start-up"]["alone"]
        rows.append(
            _line("start-up over lsst.images.cells and torch", "at most 1.2", f"{ratio:.2f}", ratio <= 1.2)
        )
        clean = not parts[0]["torch at graph"]
        rows.append(_line("building of graphs", "imports no torch", "none" if clean else "torch", clean))
    else:
        rows.append(_line("start-up over lsst.images.cells and torch", "at most 1.2", NOT_RUN, None))
    return _table(["what", "wanted", "measured", "met"], rows)


def _first_pass(found: _Found, parts: list[dict[str, Any]]) -> list[list[str]]:
    """Compare reading, statistics and writing in a quantum with bare reading and writing."""
    name = "first pass (1024x1024, 8 visits) over reading and writing alone"
    quanta = found.rows("quantum", 1024, 8, "pretrained", "cpu")
    if not parts or not quanta:
        return [_line(name, "at most 1.5", NOT_RUN, None)]
    alone = parts[0]["input and output"]
    first = sum(_median(quanta, "phases", phase) for phase in ("read", "statistics", "write"))
    ratio = first / (alone["read"] + alone["write"])
    return [_line(name, "at most 1.5", f"{ratio:.2f}", ratio <= 1.5)]


def make(cache: Path, version: str, processor: str) -> str:
    """Write the table.

    Parameters
    ----------
    cache : `pathlib.Path`
        Folder of what was measured.
    version : `str`
        Digest of the code whose numbers are shown.
    processor : `str`
        Name of the processor.

    Returns
    -------
    text : `str`
        Markdown.
    """
    found = _Found(cache, version)
    lines = [
        "# Speed and memory",
        "",
        f"`python benchmarks/speed.py`, {datetime.date.today().isoformat()}, code {version}, on two cores of "
        f"{processor} that other work shared: *load* is the number of processes that wanted to run. It makes "
        "seconds longer, CPU seconds little and memory not. Several runs take turns with other methods, and "
        "their median is shown.",
        "",
        "## What is to be reached",
        "",
        *_targets(found),
        "## Quanta, from Butler to Butler, in seconds by phase",
        "",
        "*read*: the first reading of all warps; *statistics*: weights, kernels and sensitivity; *base*: "
        "maximum likelihood; *fit*: inference or fit, data steps and points; *coadd*: residual coadd and "
        "outliers; *noise*: four noise realisations; *psf*: the restoration with injected stars; *write*: "
        "storing of the outputs; *other*: what is between them. PSFs change from cell to cell; beyond 16 "
        "visits they repeat. *Measuring*, and the peak behind it, is the quantum that makes the catalogue.",
        "",
        *_quanta(found),
        "## Other methods on the same visits, which are in memory",
        "",
        *_peers(found),
        "## Steps and kernels",
        "",
        "Bytes are the sizes of what operations read and write, as if no cache kept anything.",
        "",
        *_parts(found),
    ]
    return "\n".join(lines).rstrip() + "\n"
