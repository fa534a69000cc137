# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Measure what a quantum costs: the constants of ``deepprior estimate``.

Patches of simulated visits are restored with the default configuration by the real pipeline, one quantum at a
time on one core or a GPU. Time and memory are then put down to pixels, and to pixels times visits.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import scipy.optimize

import lsst.coadd.deepprior
from lsst.coadd.deepprior.estimate import CACHE_BYTES, CANVAS_MARGIN, STARTS
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.observation_file import ObservationFile
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.simulate import Scene, SceneConfig
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.coadd.deepprior.warp_streams import WarpHandles, cell_layout
from lsst.coadd.deepprior.weights import packaged_network
from lsst.daf.butler import Butler

DESIGN = {
    "pretrained": ((200, 4), (300, 24), (600, 12), (1800, 12)),
    "scratch": ((200, 4), (200, 12), (200, 24), (300, 12)),
}
"""Sides of the patches in pixels, and numbers of visits, on which each start is measured."""

MEMORY_DESIGN = ((900, 12),)
"""One more patch of each start, for the memory of a fit, which does not depend on the numbers of steps; these
are reduced by `FEW_STEPS`."""

FEW_STEPS = ("base_steps=10", "steps=2")

LABELS = ("deepPriorCoadd", "measureDeepPriorCoadd", "plotDeepPriorCoadd")
OUTPUTS = (
    "deep_prior_coadd",
    "deep_prior_residual",
    "deep_prior_coadd_sources",
    "deep_prior_coadd_metrics",
    "deep_prior_coadd_plot",
)


def run(*arguments: str | Path) -> None:
    """Run a command of the environment, and stop where it fails."""
    command = [str(Path(sys.executable).with_name(str(arguments[0]))), *map(str, arguments[1:])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise click.ClickException(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")


def simulate(folder: Path, side: int, n_visits: int) -> Path:
    """Make a repository with the warps of a patch in a folder."""
    warps, repo = folder / "warps", folder / "repo"
    run(
        *("deepprior", "simulate", warps, "--patches", "1", "--bands", "i", "--visits", str(n_visits)),
        *("--cells", "2", "2", "--cell-size", str(side // 2)),
    )
    run("deepprior", "ingest", repo, *sorted(warps.glob("warp_*.fits")))
    return repo


def measure(
    side: int, n_visits: int, start: str, device: str, *settings: str
) -> dict[str, float | int | str]:
    """Restore one patch, and return what it cost.

    Each task runs in a process of its own, whose largest memory is that of the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        repo = simulate(Path(folder), side, n_visits)
        pipeline = "$COADD_DEEPPRIOR_DIR/pipelines/deepPriorCoadd.yaml"
        config = (f"init={start}", f"device={device}", *settings)
        for number, label in enumerate(LABELS):
            run(
                *("pipetask", "run", "-b", repo, "-i", "deepprior/warps", "-o", "run"),
                *("-p", f"{pipeline}#{label}", "--register-dataset-types"),
                *(part for one in config for part in ("-c", f"deepPriorCoadd:{one}") if number == 0),
                *("--extend-run",) * (number > 0),
            )
        with Butler.from_config(repo, collections="run") as butler:

            def one(name: str) -> object:
                (ref,) = butler.query_datasets(name)
                return butler.get(ref)

            quanta = {label: one(f"{label}_metadata")["quantum"] for label in LABELS}  # type: ignore[index]
            metrics = one("deep_prior_coadd_metrics")
            sizes = {}
            for name in (*OUTPUTS, "deep_prior_warp"):
                ref = butler.query_datasets(name, collections=["run", "deepprior/warps"])[0]
                sizes[name] = butler.getURI(ref).size()
        cpu = {label: quantum["endCpuTime"] - quantum["startCpuTime"] for label, quantum in quanta.items()}
        return {
            "side": side,
            "visits": n_visits,
            "start": start,
            "method": metrics["method"],  # type: ignore[index]
            "seconds": cpu[LABELS[0]] if device == "cpu" else metrics["seconds"]["task"],  # type: ignore[index]
            "seconds_after": cpu[LABELS[1]] + cpu[LABELS[2]],
            "seconds_input": metrics["seconds"]["input"],  # type: ignore[index]
            "peak_bytes": int(quanta[LABELS[0]]["endMaxResidentSetSize"]),
            "peak_bytes_after": int(max(quanta[label]["endMaxResidentSetSize"] for label in LABELS[1:])),
            "output_bytes": sum(sizes[name] for name in OUTPUTS),
            "warp_bytes": sizes["deep_prior_warp"],
        }


class CountedVisits(Sequence[Observation]):
    """Visits that count how often one is asked for."""

    def __init__(self, visits: Sequence[Observation]) -> None:
        self._visits = visits
        self.n_asked = 0

    def __len__(self) -> int:
        return len(self._visits)

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        self.n_asked += 1
        return self._visits[index]


def passes(start: str) -> float:
    """Count how often the default restoration asks for a visit, on the smallest patch that it takes."""
    config = SceneConfig(n_cells=(1, 1), cell_shape=(48, 48), n_visits=12, psf_size=21)
    scene = Scene(config)
    warps = [scene.warp(number, "i") for number in range(config.n_visits)]
    visits = CountedVisits([warp.observation(DeepPriorCoaddConfig().bad_mask_planes) for warp in warps])
    if start == "scratch":
        restore(visits, cell_layout(warps[0].patch.cells))
    else:
        packaged = packaged_network()
        anywhere = dict.fromkeys(packaged.ranges, (-1e6, 1e6))
        network = dataclasses.replace(packaged, ranges=anywhere)
        restore(visits, cell_layout(warps[0].patch.cells), network=network)
    return visits.n_asked / config.n_visits


def disk_share() -> float:
    """Return the time to read pixels from ``cache_dir`` over that of reading warps, on one patch."""
    side, n_visits = MEMORY_DESIGN[0]
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), side, n_visits)
        planes = DeepPriorCoaddConfig().bad_mask_planes
        with Butler.from_config(Path(folder) / "repo", collections="deepprior/warps") as butler:
            warps = WarpHandles([butler.getDeferred(ref) for ref in butler.query_datasets("deep_prior_warp")])
            warps[0].observation(planes)  # what is imported then
            started = time.perf_counter()
            observations = [warp.observation(planes) for warp in warps]
            seconds = time.perf_counter() - started
        file = ObservationFile(Path(folder))
        numbers = [file.append(observation) for observation in observations]
        started = time.perf_counter()
        for number in numbers:
            file[number]
        return (time.perf_counter() - started) / seconds


def fit(
    rows: list[dict], memory_rows: list[dict], without_fit: dict[str, float] | None = None
) -> dict[str, float]:
    """Put time and memory down to pixels of the canvas, and to pixels times visits, by least squares.

    Given the constants of a start without a fit of the network, what is above them is put down to the fit.
    """

    def values(name: str, rows: list[dict] = rows) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    def positive(terms: list[np.ndarray], target: np.ndarray, scale: np.ndarray) -> list[float]:
        matrix = np.stack(terms, axis=1) / scale[:, None]  # relative deviations count
        return [float(value) for value in scipy.optimize.nnls(matrix, target / scale)[0]]

    def sizes(rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inner = values("side", rows) ** 2
        return (values("side", rows) + 2 * CANVAS_MARGIN) ** 2, inner, inner * values("visits", rows)

    canvas, _, _ = sizes(rows)
    seconds = values("seconds")
    # From 5 visits on memory depends on their number by the cache alone.
    same = [row for row in [*rows, *memory_rows] if row["visits"] == MEMORY_DESIGN[0][1]]
    memory_canvas, memory_inner, memory_visits = sizes(same)
    peak = values("peak_bytes", same) - CACHE_BYTES * memory_visits
    one = np.ones_like(memory_canvas)
    terms = [np.ones_like(canvas), canvas, canvas * values("visits")]
    if without_fit is None:
        times, memory = positive(terms, seconds, seconds), positive([one, memory_canvas], peak, peak)
        fitted, fit_memory = [0.0, 0.0], [0.0]
    else:
        times = [without_fit[f"seconds_{name}"] for name in ("start", "per_pixel", "per_pixel_and_visit")]
        memory = [without_fit["memory_bytes"], without_fit["memory_bytes_per_pixel"]]
        fitted = positive(terms[1:], seconds - np.dot(times, terms), seconds)
        fit_memory = positive([memory_canvas], peak - np.dot(memory, [one, memory_canvas]), peak)
    model = np.dot(np.add(times, [0.0, *fitted]), terms)
    peak_after, seconds_after = values("peak_bytes_after", same), values("seconds_after", same)
    after = positive([one, memory_inner], peak_after, peak_after)
    time_after = positive([one, memory_inner], seconds_after, seconds_after)
    largest = max(same, key=lambda row: row["side"])
    return {
        "seconds_start": times[0],
        "seconds_per_pixel": times[1],
        "seconds_per_pixel_and_visit": times[2],
        "seconds_fit_per_pixel": fitted[0],
        "seconds_fit_per_pixel_and_visit": fitted[1],
        "largest_relative_deviation": float(np.max(np.abs(model / seconds - 1.0))),
        "seconds_after": time_after[0],
        "seconds_after_per_pixel": time_after[1],
        "seconds_read_per_pixel_and_visit": largest["seconds_input"]
        / (largest["side"] ** 2 * largest["visits"]),
        "disk_share": disk_share(),
        "passes": passes(rows[0]["start"]),
        "memory_bytes": memory[0],
        "memory_bytes_per_pixel": memory[1],
        "memory_fit_bytes_per_pixel": fit_memory[0],
        "memory_after_bytes": after[0],
        "memory_after_bytes_per_pixel": after[1],
        "output_bytes_per_pixel": largest["output_bytes"] / largest["side"] ** 2,
        "warp_bytes_per_pixel": largest["warp_bytes"] / largest["side"] ** 2,
    }


def processor(device: str) -> str:
    """Name the device."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Default: config/costs/DEVICE.json.")
def main(device: str, output: Path | None) -> None:  # noqa: D103
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, list[dict]] = {}
    for start in STARTS:
        for name, design, settings in (("time", DESIGN[start], ()), ("memory", MEMORY_DESIGN, FEW_STEPS)):
            for side, n_visits in design:
                row = measure(side, n_visits, start, device, *settings)
                rows.setdefault(f"{name} {start}", []).append(row)
                click.echo(json.dumps(row))
    pretrained, scratch = ((rows[f"time {start}"], rows[f"memory {start}"]) for start in STARTS)
    without_fit = fit(*pretrained)
    result = {
        "device": device,
        "processor": processor(device),
        "date": datetime.date.today().isoformat(),
        "version": lsst.coadd.deepprior.__version__,
        "starts": {"pretrained": without_fit, "scratch": fit(*scratch, without_fit)},
        "measured": rows,
    }
    path = output or Path(__file__).parents[1] / "config/costs" / f"{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"written to {path}")


if __name__ == "__main__":
    main()
