# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Are fluxes, errors, positions, noise and masks right? Injects objects, restores, and writes
``calibration.md``.

``python benchmarks/calibration.py`` does all; ``--help`` tells how to do a part. `injection` makes the
scenes, `calibration_score` restores and compares, `calibration_report` writes the tables. What was done is
kept in
``benchmarks/.cache/calibration`` and done again only where code has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import calibration_report
import click
from cache import code_and_network, code_of, digest, write_atomically, write_text

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "calibration"

FIRST_SEED = 400
"""First seed that is reported; scenes from 300 to 399 were used to choose settings."""

FAMILIES = {"standard": 44, "correlated_noise": 44, "background_errors": 5}
"""Number of scenes by family."""

_WITH_PLANES = 15
"""Number of scenes of a family on which the pixels are judged, with the default number of noise realisations;
the others draw one, which is enough for the catalogue and takes half the time."""

REAL_SEEDS = range(8)
"""Seeds of the injections into real warps."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A scene to be restored and judged."""

    family: str
    seed: int
    judge_pixels: bool

    @property
    def products(self) -> Path:
        """File of the scene's restoration (`pathlib.Path`)."""
        key = digest([code_and_network(("injection", "restore", "weights")), self.judge_pixels])
        return CACHE / f"{self.family}-{self.seed}-{key}.npz"

    @property
    def row(self) -> Path:
        """File of its numbers (`pathlib.Path`)."""
        key = digest([self.products.stem, code_of(("calibration_score",))])
        return CACHE / f"{self.family}-{self.seed}-{key}.json"


def _do(job: Job) -> None:
    """Simulate, restore and judge a scene."""
    import torch
    from calibration_score import Products, catalogue_of, restore_scene, score_pixels, score_sources
    from injection import injected_scene
    from sky import sky_of

    torch.set_num_threads(1)
    scene = injected_scene(job.family, job.seed)
    if not job.products.is_file():
        draws = 4 if job.judge_pixels else 1
        write_atomically(job.products, restore_scene(scene.observations, scene.layout, draws).save)
    products = Products.load(job.products)
    sky = sky_of(scene)
    row: dict[str, Any] = score_sources(scene, sky, *catalogue_of(products, scene.start))
    if job.judge_pixels:
        row["pixels"] = score_pixels(scene, sky, products)
    write_text(job.row, json.dumps(row))


def _real_row(paths: tuple[Path, ...], seed: int) -> Path:
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return CACHE / f"real-{seed}-{digest([content, code_and_network(('calibration_score',))])}.json"


def _do_real(paths: tuple[Path, ...], seed: int, row: Path) -> None:
    """Inject into real warps, restore and judge."""
    import torch
    from calibration_score import score_real_injection

    torch.set_num_threads(1)
    write_text(row, json.dumps(score_real_injection(paths, seed)))


@click.command()
@click.option("--scenes", default=None, type=click.IntRange(1), help="Scenes of each family, if not all.")
@click.option(
    "--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Family; all by default."
)
@click.option(
    "--warps",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Warp file of one patch of real data to inject into; give the option once a file.",
)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes at a time.")
@click.option(
    "--output",
    default=HERE / "calibration.md",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The report.",
)
def main(
    scenes: int | None, families: tuple[str, ...], warps: tuple[Path, ...], workers: int, output: Path
) -> None:
    """Measure whether the products of restored scenes are what they claim to be, and write the report.

    The report holds all scenes that were ever judged with the present code.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    plan = {
        family: [
            Job(family, FIRST_SEED + k, k < _WITH_PLANES)
            for k in range(min(scenes or n, n) if not families or family in families else 0)
        ]
        for family, n in FAMILIES.items()
    }
    # Families take turns, so that an interrupted run has some of each.
    jobs = [
        job
        for turn in range(max(FAMILIES.values()))
        for group in plan.values()
        for job in group[turn : turn + 1]
    ]
    left = [job for job in jobs if not job.row.is_file()]
    real = [(warps, seed, _real_row(warps, seed)) for seed in REAL_SEEDS] if warps else []
    left_real = [call for call in real if not call[2].is_file()]
    click.echo(f"{len(left) + len(left_real)} of {len(jobs) + len(real)} scenes are left.")
    failures = []
    started = time.monotonic()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_do_real, *call): f"real warps {call[1]}" for call in left_real}
        futures |= {pool.submit(_do, job): f"{job.family} {job.seed}" for job in left}
        for n, future in enumerate(as_completed(futures), start=1):
            error = future.exception()
            if error is not None:
                failures.append(f"{futures[future]} failed: {error}")
            minutes = (time.monotonic() - started) / 60.0
            click.echo(
                f"[{n}/{len(futures)}] {futures[future]}: {'done' if error is None else f'FAILED: {error}'}; "
                f"about {minutes / n * (len(futures) - n):.1f} min left"
            )
    rows = {
        family: [json.loads(path.read_text()) for k in range(n) if (path := _row_of(family, k)).is_file()]
        for family, n in FAMILIES.items()
    }
    real_rows = [json.loads(path.read_text()) for _, _, path in real if path.is_file()]
    write_text(output, calibration_report.make(rows, real_rows, FIRST_SEED))
    click.echo(f"{output} is written.")
    for failure in failures:
        click.echo(failure, err=True)
    if failures:
        raise SystemExit(1)


def _row_of(family: str, k: int) -> Path:
    return Job(family, FIRST_SEED + k, k < _WITH_PLANES).row


if __name__ == "__main__":
    main()
