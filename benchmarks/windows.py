# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What it costs that a fit from scratch sees windows of a patch and not all of it; writes ``windows.md``.

``python benchmarks/windows.py`` does all. What was done is kept in ``benchmarks/.cache/windows``, and done
again only where code has changed.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import click
from cache import code_and_network, write_text

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "windows"
NOT_RUN = "not run"

WHOLE = 0
"""Side of the windows that stands for no windows."""

DESIGN = (
    *(((4, 4), 400, side) for side in (None, 256, WHOLE)),
    *(((7, 8), 401, side) for side in (None, 256, 512, WHOLE)),
)
"""Cells of 150 pixels, seed of the scene, and least side of windows in pixels; `None` is the pretrained
start, for comparison."""

SCORES = (("psnr", "PSNR (dB)", 2), ("ssim", "SSIM", 3), ("completeness", "completeness at 95 % purity", 3))


def row_path(cells: tuple[int, int], seed: int, side: int | None) -> Path:
    """Return the file of the numbers of a restoration."""
    code = code_and_network(("restore", "windows", "weights", "simulate"), alone=("windows",))
    return CACHE / f"{cells[0]}x{cells[1]}-{seed}-{side}-{code}.json"


def restore(cells: tuple[int, int], seed: int, side: int | None) -> dict[str, Any]:
    """Restore a scene and judge it, in a process of its own."""
    import torch
    from scenes import TARGET_SIGMA
    from score import score_image
    from simulation import bench_scene
    from sky import sky_of

    from lsst.coadd.deepprior import windows
    from lsst.coadd.deepprior.families import family_scene
    from lsst.coadd.deepprior.fitted_patch import RestoreSettings, fit_patch
    from lsst.coadd.deepprior.psf import FWHM_PER_SIGMA, gaussian_stamp
    from lsst.coadd.deepprior.simulate import Scene
    from lsst.coadd.deepprior.weights import packaged_network

    torch.set_num_threads(1)
    config = dataclasses.replace(family_scene("standard", seed), n_cells=cells, cell_shape=(150, 150))
    scene = bench_scene(Scene(config))
    if side is not None:
        windows.WINDOW = side or max(scene.layout.shape)
    network = packaged_network() if side is None else None
    settings = RestoreSettings(target_fwhm=FWHM_PER_SIGMA * TARGET_SIGMA)
    started = time.process_time()
    fit = fit_patch(scene.observations, scene.layout, settings, network=network)
    seconds = time.process_time() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = fit.image(fit.points.latent).astype(float)
    scores = score_image(scene, sky_of(scene), image, gaussian_stamp(TARGET_SIGMA, 25))
    return {"cpu": seconds, "peak": peak, **{name: scores[name] for name, *_ in SCORES}}


def report() -> str:
    """Write all that was measured with the present code as Markdown."""
    text = [
        "# A fit from scratch of windows of a patch, and of all of it",
        "",
        "Written by `python benchmarks/windows.py`; do not edit. One scene of the standard family of each "
        "size, 12 visits, one thread. CPU seconds and the largest memory of the process are those of the "
        "image, without noise realisations. What was not run with the present code prints 'not run'.",
        "",
        "| pixels | fit | CPU s | peak GB | " + " | ".join(title for _, title, _ in SCORES) + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for cells, seed, side in DESIGN:
        title = {None: "none: pretrained", WHOLE: "whole"}.get(side, f"windows of {side} or more")
        line = f"| {150 * cells[0]}x{150 * cells[1]} | {title} | "
        path = row_path(cells, seed, side)
        if not path.is_file():
            text.append(line + NOT_RUN + " |" * 5)
            continue
        row = json.loads(path.read_text())
        scores = " | ".join(f"{row[name]:.{digits}f}" for name, _, digits in SCORES)
        text.append(f"{line}{row['cpu']:.0f} | {row['peak'] / 1e9:.2f} | {scores} |")
    return "\n".join(text) + "\n"


@click.command(help=__doc__)
@click.option("--output", default=HERE / "windows.md", type=click.Path(path_type=Path), show_default=True)
def main(output: Path) -> None:  # noqa: D103
    os.environ["OMP_NUM_THREADS"] = "1"
    for job in DESIGN:
        if not row_path(*job).is_file():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                write_text(row_path(*job), json.dumps(pool.apply(restore, job)))
            click.echo(f"{job} is done")
        write_text(output, report())


if __name__ == "__main__":
    main()
