# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How fast and how large is a quantum? Runs the real pipeline, times its phases, and writes ``speed.md``.

Patches of simulated visits, whose PSFs change from cell to cell, are restored by ``pipetask run`` from a
Butler repository on disk, one quantum at a time in a process of its own, and by other methods on the same
visits.
What was measured is kept in ``benchmarks/.cache`` and done again only where code has changed; the table holds
what was measured with the present code, and says "not run" of the rest. ``speed_parts`` measures what no
quantum shows: single steps, their growth, start-up, and bare reading and writing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import speed_report
from astropy.io import fits
from cache import code_of, write_text
from costs import processor, run
from methods import METHODS

from lsst.coadd.deepprior.simulate import SceneConfig, write_scene
from lsst.daf.butler import Butler

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "speed"
PIPELINE = "$COADD_DEEPPRIOR_DIR/pipelines/deepPriorCoadd.yaml"

CELLS = {512: 4, 1024: 8, 3400: 20}
"""Number of cells along each side, by the size of the patch in pixels."""

DISTINCT = 16
"""Number of visits that are simulated; more are copies under other numbers, with the same cost."""

PEERS = tuple(speed_report.PEERS)
"""Methods to compare with."""

MODULES = ("restore", "weights", "warp_streams", "coadd", "execution", "deep_prior_coadd", "measure")
"""Modules whose code makes the quanta."""

ALONE = ("speed_peer", "speed_parts")

PARTS_PATCH = (1024, 8)
"""Size and number of visits of the patch of `speed_parts`."""


def repository(size: int, n_visits: int) -> Path:
    """Return a repository with warps of a patch of some size, simulated if it is not there."""
    key = code_of(("simulate",), alone=("speed",))
    repo = CACHE / f"repo-{size}-{n_visits}-{key}"
    if not repo.exists():
        cells = CELLS[size]
        config = SceneConfig(
            n_cells=(cells, cells),
            cell_shape=(size // cells, size // cells),
            n_visits=min(n_visits, DISTINCT),
            psf_fwhm_change=0.05,
            psf_ellipticity_change=0.02,
        )
        folder, part = CACHE / f"warps-{size}-{n_visits}", repo.with_name(f"unfinished-{repo.name}")
        for old in (folder, part):
            shutil.rmtree(old, ignore_errors=True)
        report(f"simulating {config.n_visits} visits of {size}x{size} pixels")
        files = write_scene(folder, config, ["i"])
        first = [int(fits.getval(file, "VISIT")) for file in files]
        for number in range(DISTINCT, n_visits):
            copy = folder / f"copy_{number}.fits"
            shutil.copy(files[number % DISTINCT], copy)
            fits.setval(copy, "VISIT", value=max(first) + number)
            files.append(copy)
        report(f"ingesting {len(files)} visits")
        run("deepprior", "ingest", part, *files)
        shutil.rmtree(folder)
        part.rename(repo)
    return repo


def report(text: str) -> None:
    """Say what is going on."""
    click.echo(f"[{time.strftime('%H:%M:%S')}] {text}")


def kept(kind: str, version: str, parts: tuple[Any, ...], measure: Callable[[], Any] | None) -> Any:
    """Return what was measured before, or measure it and keep it; `None` if there is nothing."""
    path = CACHE / f"{kind}-{'-'.join(map(str, parts))}-{version}.json"
    if not path.is_file():
        if measure is None:
            return None
        report(f"{kind} {' '.join(map(str, parts))}: load {os.getloadavg()[0]:.1f}")
        write_text(path, json.dumps(measure() | {"load": os.getloadavg()[0]}))
    return json.loads(path.read_text())


def version() -> str:
    """Return a digest of the code of a quantum."""
    names = [name for name in MODULES if (HERE.parent / f"python/lsst/coadd/deepprior/{name}.py").is_file()]
    return code_of(names, alone=("speed", *ALONE))


def quantum(size: int, n_visits: int, start: str, device: str, cores: int) -> dict[str, Any]:
    """Restore a patch and measure its sources by the pipeline; return seconds by phase, and memory."""
    repo = repository(size, n_visits)
    output = f"speed/{start}-{os.getpid()}-{time.time_ns()}"
    pipetask = ("pipetask", "run", "-n", cores, "-b", repo, "-i", "deepprior/warps", "-o", output)
    run(
        *(*pipetask, "-p", f"{PIPELINE}#deepPriorCoadd"),
        *("--register-dataset-types", "-c", f"deepPriorCoadd:device={device}"),
        *("-c", f"deepPriorCoadd:init={start}", "-c", f"deepPriorCoadd:cache_dir={CACHE}"),
    )
    run(
        *(*pipetask, "-p", f"{PIPELINE}#measureDeepPriorCoadd"),
        *("--register-dataset-types", "--extend-run"),
    )
    with Butler.from_config(repo, collections=output) as butler:

        def only(name: str) -> Any:
            (ref,) = butler.query_datasets(name)
            return butler.get(ref)

        metrics = only("deep_prior_coadd_metrics")
        restoring = only("deepPriorCoadd_metadata")
        measuring = only("measureDeepPriorCoadd_metadata")["quantum"]
    seconds, metadata = metrics["seconds"], restoring["quantum"]
    begin, end = (metadata[f"{name}Utc"] for name in ("start", "end"))
    total = speed_report.seconds_between(str(begin), str(end))
    phases = {
        "read": seconds["input"],
        "statistics": seconds["read"],
        **{name: seconds[name] for name in ("base", "fit", "coadd", "noise", "psf")},
    }
    return {
        "phases": phases
        | {"write": total - seconds["task"], "other": seconds["task"] - sum(phases.values())},
        "total": total,
        "cpu": metadata["endCpuTime"] - metadata["startCpuTime"],
        "peak_gb": metadata["endMaxResidentSetSize"] / 1e9,
        "gpu_peak_gb": restoring["deepPriorCoadd"]["gpu_peak_bytes"] / 1e9,
        "measure_cpu": measuring["endCpuTime"] - measuring["startCpuTime"],
        "measure_peak_gb": measuring["endMaxResidentSetSize"] / 1e9,
        "method": metrics["method"],
        "cores": cores,
    }


def script(name: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder in a process of its own, and return what it prints as JSON."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def able(peer: str) -> bool:
    """Return whether a method can be run here."""
    return peer not in METHODS or all(path.exists() for path in METHODS[peer].files)


@click.command(help=__doc__)
@click.option("--size", "sizes", multiple=True, type=click.Choice([str(size) for size in CELLS]))
@click.option("--visits", multiple=True, type=click.IntRange(1), help="Default: 8, 32, 128, and 16 of 512.")
@click.option("--start", "starts", multiple=True, type=click.Choice(["pretrained", "scratch"]))
@click.option("--device", "devices", multiple=True, type=click.Choice(["cpu", "cuda"]), help="Default: cpu.")
@click.option("--cores", default=2, show_default=True, type=click.IntRange(1), help="Cores of a quantum.")
@click.option(
    "--repeats", default=3, show_default=True, type=click.IntRange(1), help="Of patches up to 1024."
)
@click.option("--no-peers", is_flag=True, help="Leave out the other methods.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "speed.md", show_default=True)
def main(  # noqa: D103
    sizes: tuple[str, ...],
    visits: tuple[int, ...],
    starts: tuple[str, ...],
    devices: tuple[str, ...],
    cores: int,
    repeats: int,
    no_peers: bool,
    output: Path,
) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    chosen = [int(size) for size in sizes] or list(CELLS)
    design = [(size, n) for size in chosen for n in visits or ((16,) if size == 512 else ()) + (8, 32, 128)]
    now = version()

    def write() -> None:
        write_text(output, speed_report.make(CACHE, now, processor("cpu")))

    for size, n_visits in design:
        for repeat in range(repeats if size <= 1024 else 1):
            # Methods take turns, so that a change of the machine's load touches all alike.
            for start in starts or ("pretrained", "scratch"):
                for device in devices or ("cpu",):
                    parts = (size, n_visits, start, device, cores, repeat)
                    kept("quantum", now, parts, lambda parts=parts: quantum(*parts[:5]))
                    write()
            for peer in () if no_peers or "cpu" not in (devices or ("cpu",)) else filter(able, PEERS):
                repo = repository(size, n_visits)
                kept(
                    "peer",
                    now,
                    (size, n_visits, peer, cores, repeat),
                    lambda peer=peer, repo=repo: script("speed_peer.py", repo, peer, cores),
                )
                write()
    for device in devices or ("cpu",):
        # Its outputs are written again.
        parts = (*PARTS_PATCH, "pretrained", device, cores, 0)
        kept("quantum", now, parts, lambda parts=parts: quantum(*parts[:5]))
        kept(
            "parts",
            now,
            (device, cores),
            lambda device=device: script("speed_parts.py", repository(*PARTS_PATCH), device, cores),
        )
    write()
    click.echo(f"{output} is written.")


if __name__ == "__main__":
    main()
