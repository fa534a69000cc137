# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How near to the truth is each method? Simulates scenes, runs all methods, and writes ``fidelity.md``.

``python benchmarks/fidelity.py`` does all; ``--help`` tells how to do a part. `simulation` makes `scenes`,
`methods` runs one method in a process of its own, `sky`, `score` and `metrics` compare an image with the
truth, `summary` makes one number of several scenes, `report` and `reach` write the table, `cache` names
files.

Everything that was done is kept in ``benchmarks/.cache`` and done again only where code or settings have
changed, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import report
from cache import code_of, digest, write_atomically, write_text
from methods import METHODS
from score import score_output
from simulation import GLOW, make_scene

from lsst.coadd.deepprior.families import FAMILIES

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
TUNING_SEEDS = (100, 101)
"""Scenes of the standard family on which settings are chosen."""

REPORT_SEEDS = {"standard": tuple(range(1, 11))}
"""Scenes that are reported, by family."""

OTHER_SEEDS = (1, 2)
"""Scenes of the families that `REPORT_SEEDS` does not name."""

_ALL_FAMILIES = (*FAMILIES, GLOW)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a method on a scene."""

    family: str
    seed: int
    method: str
    settings: tuple[str, ...]

    @property
    def label(self) -> str:
        """What messages call the run (`str`)."""
        which = f" ({len(self.settings)} settings)" if len(self.settings) > 1 else ""
        return f"{self.family} {self.seed} {self.method}{which}"

    @property
    def scene(self) -> Path:
        """File of the scene (`pathlib.Path`)."""
        return scene_path(self.family, self.seed)

    @functools.cached_property
    def output(self) -> Path | None:
        """File of the images, named by the scene's content and the method's code; `None` without a scene."""
        if not self.scene.is_file():
            return None
        key = digest([scene_digest(self.scene), method_version(self.method), self.settings])
        return CACHE / "outputs" / f"{self.family}-{self.seed}-{self.method}-{key}.npz"

    @functools.cached_property
    def row(self) -> Path | None:
        """File of the numbers (`pathlib.Path` or `None`)."""
        if self.output is None:
            return None
        key = digest([self.output.stem, _score_version()])
        return CACHE / "rows" / f"{self.family}-{self.seed}-{self.method}-{key}.json"

    @property
    def is_done(self) -> bool:
        """Whether its numbers are there (`bool`)."""
        return self.row is not None and self.row.is_file()


@functools.cache
def _scene_version() -> str:
    """Return a digest of the code that simulates scenes."""
    return code_of(("families", "simulate", "simulation"))


def scene_path(family: str, seed: int) -> Path:
    """Return the file of a scene, which the code of the simulation names."""
    return CACHE / "scenes" / f"{family}-{seed}-{_scene_version()}.npz"


@functools.cache
def scene_digest(path: Path) -> str:
    """Return a digest of the content of a scene."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def method_version(name: str) -> str:
    """Return a digest of the code and, for a trained network, of the weights that make a method."""
    method = METHODS[name]
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in method.files if path.is_file()]
    return digest([code_of(method.modules, alone=("methods",)), weights])


@functools.cache
def _score_version() -> str:
    """Return a digest of the code that makes numbers of images."""
    return code_of(("score",))


def missing_modules(name: str) -> bool:
    """Return whether a method cannot be run here."""
    try:
        code_of(METHODS[name].modules)
    except FileNotFoundError:
        return True
    return not all(path.exists() for path in METHODS[name].files)


def _make_scene(family: str, seed: int, path: Path) -> None:
    write_atomically(path, make_scene(family, seed).save)


def _run(job: Job) -> None:
    """Run a method in its own process, with one thread."""
    assert job.output is not None
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

    def run(part: Path) -> None:
        command = [sys.executable, str(HERE / "methods.py"), str(job.scene), job.method]
        command += [json.dumps(job.settings), str(part)]
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(lines[-1])

    write_atomically(job.output, run)


def _score(scene: Path, output: Path, settings: Sequence[str], method: str, row: Path) -> None:
    rows = score_output(
        scene, output, settings, whole=METHODS[method].whole, own_resolution=method == "coadd"
    )
    write_text(row, json.dumps(rows))


class Bench:
    """Runs jobs and finds their rows.

    Parameters
    ----------
    workers : `int`
        Number of processes at a time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.failures: dict[Job, str] = {}

    def rows(self, family: str, seeds: Iterable[int], method: str, setting: str) -> list[dict[str, Any]]:
        """Return the rows of a setting that are there and not stale, with the numbers of their runs."""
        found = []
        for seed in seeds:
            for settings in dict.fromkeys([(setting,), METHODS[method].grid]):
                job = Job(family, seed, method, settings)
                if setting in (*settings, "own resolution") and job.row is not None and job.is_done:
                    rows = json.loads(job.row.read_text())
                    alone = len(settings) == 1
                    found.append(rows[setting] | {"seed": seed, "run": rows["run"] if alone else {}})
                    break
        return found

    def tuned(self, method: str) -> str | None:
        """Return the setting of largest median PSNR on the tuning scenes, `None` if it was not tuned."""
        grid = METHODS[method].grid
        if len(grid) == 1:
            return grid[0]
        quality = {}
        for setting in grid:
            rows = self.rows("standard", TUNING_SEEDS, method, setting)
            if len(rows) < len(TUNING_SEEDS):
                return None
            quality[setting] = statistics.median(row["psnr"] for row in rows)
        return max(quality, key=quality.__getitem__)

    def work(self, jobs: Sequence[Job], title: str) -> None:
        """Simulate, run and score what is missing."""
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(self._workers, context) as processes,
            ThreadPoolExecutor(self._workers) as threads,
        ):
            scenes = {job.scene: job for job in jobs if not job.scene.is_file()}
            self._all(
                f"{title}: scenes",
                processes,
                [(job, _make_scene, (job.family, job.seed, path)) for path, job in scenes.items()],
            )
            jobs = [dataclasses.replace(job) for job in jobs]  # the names of files depend on the scenes
            left = [job for job in jobs if job.output is not None and not job.output.is_file()]
            self._all(f"{title}: runs", threads, [(job, _run, (job,)) for job in left])
            left = [job for job in jobs if job.output and job.output.is_file()]
            self._all(
                f"{title}: scores",
                processes,
                [
                    (job, _score, (job.scene, job.output, job.settings, job.method, job.row))
                    for job in left
                    if not job.is_done
                ],
            )

    def _all(
        self,
        title: str,
        executor: Executor,
        calls: Sequence[tuple[Job, Callable[..., None], tuple[Any, ...]]],
    ) -> None:
        """Call functions in parallel and say how far it is."""
        started = time.monotonic()
        futures: dict[Future[None], Job] = {
            executor.submit(f, *arguments): job for job, f, arguments in calls
        }
        for n, future in enumerate(as_completed(futures), start=1):
            job, error = futures[future], future.exception()
            if error is not None:
                self.failures[job] = str(error)
            elapsed = time.monotonic() - started
            left = elapsed / n * (len(futures) - n) / 60.0
            state = f"{'done' if error is None else f'FAILED: {error}'}; {elapsed:.0f} s"
            click.echo(f"[{title} {n}/{len(futures)}] {job.label}: {state}, about {left:.1f} min left")


def _seeds_of(family: str, asked: tuple[int, ...]) -> tuple[int, ...]:
    return asked or REPORT_SEEDS.get(family, OTHER_SEEDS)


def _reported(bench: Bench, family: str, asked: tuple[int, ...]) -> tuple[int, ...]:
    """Return the default scenes of a family, and of those asked for the ones that have a result."""
    default = REPORT_SEEDS.get(family, OTHER_SEEDS)
    found = [seed for seed in asked if bench.rows(family, (seed,), "coadd", "")]
    return tuple(dict.fromkeys((*default, *found)))


def _jobs(bench: Bench, family: str, seeds: Sequence[int], methods: Sequence[str]) -> list[Job]:
    """List the runs on the reported scenes of a family."""
    jobs = []
    for name in methods:
        method = METHODS[name]
        if not method.is_for(family):
            continue
        if family == "standard":
            jobs += [Job(family, seed, name, method.grid) for seed in seeds]
        setting = bench.tuned(name)
        if setting is not None and family == "standard" and len(method.grid) > 1:
            jobs.append(Job(family, seeds[0], name, (setting,)))  # time and memory of one setting
        elif setting is not None and family != "standard":
            jobs += [Job(family, seed, name, (setting,)) for seed in seeds]
    return jobs


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in value.split(",") if part))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,2,3.") from None
    if set(numbers) & set(TUNING_SEEDS):
        raise click.BadParameter(f"scenes {TUNING_SEEDS} are for tuning and are not reported.")
    return numbers


@click.command()
@click.option(
    "--family",
    "families",
    multiple=True,
    type=click.Choice(_ALL_FAMILIES),
    help="Family to run; all by default.",
)
@click.option("--seeds", default="", callback=_numbers, help="Scenes to report, such as 1,2,3.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    help="Method to run; all by default.",
)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes at a time.")
@click.option(
    "--output",
    default=HERE / "fidelity.md",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The table.",
)
def main(
    families: tuple[str, ...], seeds: tuple[int, ...], methods: tuple[str, ...], workers: int, output: Path
) -> None:
    """Simulate scenes, run all methods on them, and write the table of their fidelity.

    The table holds all that was ever run with the present code; the rest prints 'not run'.
    """
    bench = Bench(workers)
    able = [name for name in METHODS if not missing_modules(name)]
    chosen = [name for name in able if not methods or name in methods]
    for name in set(methods) - set(able):
        click.echo(f"{name} cannot be run here: a part of it is not installed.", err=True)

    def write() -> None:
        seeds_of = {family: _reported(bench, family, seeds) for family in _ALL_FAMILIES}
        text = report.make(bench, seeds_of, TUNING_SEEDS, {name: method_version(name) for name in able})
        write_text(output, text)

    grids = [name for name in chosen if len(METHODS[name].grid) > 1]
    bench.work(
        [Job("standard", seed, name, METHODS[name].grid) for seed in TUNING_SEEDS for name in grids], "tuning"
    )
    plan = {
        family: _jobs(bench, family, _seeds_of(family, seeds), chosen) for family in families or _ALL_FAMILIES
    }
    left = sum(not job.is_done for jobs in plan.values() for job in jobs)
    click.echo(f"{left} of {sum(map(len, plan.values()))} runs are left in {len(plan)} families.")
    for number, (family, jobs) in enumerate(plan.items(), start=1):
        bench.work(jobs, f"family {number} of {len(plan)}, {family}")
        write()
    for job, error in bench.failures.items():
        click.echo(f"{job.label} failed: {error}", err=True)
    click.echo(f"{output} is written.")
    if bench.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
