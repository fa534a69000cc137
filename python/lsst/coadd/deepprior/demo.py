# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The whole way on simulated exposures: simulate, ingest, restore, compare with the truth (`make demo`)."""

from __future__ import annotations

__all__ = ("main",)

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from astropy.table import Table
from rich.console import Console
from rich.table import Table as TextTable

from lsst.daf.butler import Butler, MissingDatasetTypeError

from .evaluate import Gain, evaluate, pool
from .tasks.geometry import pixel_scale, plain_coadd

_PATCHES = 2
_BANDS = ("r", "i")
_VISITS = 12
_OUTPUT = "u/demo/deepprior"
_DATASETS = {
    "deep_prior_coadd": "restored coadd",
    "deep_prior_residual": "residual coadd",
    "deep_prior_coadd_sources": "source list",
    "deep_prior_coadd_outliers": "outliers of the visits",
    "deep_prior_coadd_metrics": "numbers of the run",
    "deep_prior_coadd_plot": "figure",
}


def _command(name: str) -> str:
    """Return the path of a command of the environment that runs this."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else name


def _run(*arguments: str | Path) -> None:
    """Run a command, show it and what it prints, and stop if it fails."""
    shown = " ".join(str(a) for a in (Path(str(arguments[0])).name, *arguments[1:]))
    click.echo(f"\n$ {shown}", err=True)
    status = subprocess.run([str(a) for a in arguments], check=False).returncode
    if status != 0:
        raise click.ClickException(
            f"'{shown}' failed with exit status {status}; its messages are above. 'make clean', or removing "
            "the folder of the demo, starts over."
        )


def _simulate(warps: Path, repo: Path) -> list[Path]:
    """Make the warp files, unless those of the same scene are there; those of another are removed with its
    repository.
    """
    arguments = (
        "--patches", str(_PATCHES), "--bands", ",".join(_BANDS), "--visits", str(_VISITS),
        "--cell-size", "125",
    )  # fmt: skip
    complete = warps / "complete"
    scene = complete.read_text() if complete.is_file() else None
    if scene != " ".join(arguments):
        if scene is None and warps.exists() and not (warps.is_dir() and next(warps.iterdir(), None) is None):
            raise click.ClickException(
                f"{warps} was not made by the demo, which would remove it; name another directory."
            )
        if scene and repo.exists():
            shutil.rmtree(repo)
        shutil.rmtree(warps, ignore_errors=True)
        warps.mkdir(parents=True)
        complete.touch()
        _run(_command("deepprior"), "simulate", warps, *arguments)
        complete.write_text(" ".join(arguments))
    return sorted(warps.glob("warp_*.fits"))


def _n_processes() -> int:
    """Return how many quanta to run at a time: one for each core that this process may use."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cores, _PATCHES * len(_BANDS))


def _restore(repo: Path) -> None:
    """Run the pipeline, or what an earlier run has left to do."""
    with Butler.from_config(repo) as butler:
        earlier = _OUTPUT in butler.collections.query("*")
        if earlier and _is_complete(butler):
            return
    again = ("--extend-run", "--skip-existing", "--clobber-outputs") if earlier else ()
    _run(
        _command("pipetask"), "run", "-b", repo, "-i", "deepprior/warps", "-o", _OUTPUT,
        "-p", "$COADD_DEEPPRIOR_DIR/pipelines/deepPriorCoadd.yaml", "--register-dataset-types",
        "-j", str(_n_processes()), *again,
    )  # fmt: skip


def _is_complete(butler: Butler) -> bool:
    """Return whether every patch and band has all datasets."""
    try:
        return all(
            len(butler.query_datasets(name, collections=_OUTPUT, explain=False)) == _PATCHES * len(_BANDS)
            for name in _DATASETS
        )
    except MissingDatasetTypeError:  # interrupted before the first dataset
        return False


def _gains(butler: Butler, warps: Path) -> list[list[Gain]]:
    """Compare every patch and band with its truth."""
    result = []
    for ref in sorted(
        butler.query_datasets("deep_prior_coadd"), key=lambda ref: (ref.dataId["patch"], ref.dataId["band"])
    ):
        coadd = butler.get(ref)
        residual, sources = (
            butler.get(name, ref.dataId) for name in ("deep_prior_residual", "deep_prior_coadd_sources")
        )
        truth = Table.read(warps / f"truth_{ref.dataId['patch']}_{ref.dataId['band']}.ecsv")
        plain, sigma = plain_coadd(coadd, residual)
        scale = pixel_scale(coadd.sky_projection, coadd.bbox)
        result.append(evaluate(plain, coadd.image.array, sigma, sources, truth, coadd.bbox, scale))
    return result


def _print_table(console: Console, gains: list[Gain]) -> None:
    """Print the pooled rows."""
    table = TextTable(title="Against the truth", title_justify="left")
    table.add_column("quantity")
    for name in ("plain coadd", "restored", "number"):
        table.add_column(name, justify="right")
    for gain in gains:
        plain, restored = (
            "-" if np.isnan(number) else f"{number:.2f}" if gain.kind == "median" else f"{number:.1f}"
            for number in gain.numbers()
        )
        table.add_row(gain.name, plain, restored, str(len(gain.restored)))
    console.print(table)


def _print_places(console: Console, butler: Butler) -> None:
    """Print where the outputs are."""
    for name, text in _DATASETS.items():
        console.print(f"{text} ({name}):")
        for ref in sorted(
            butler.query_datasets(name), key=lambda ref: (ref.dataId["patch"], ref.dataId["band"])
        ):
            uri = butler.getURI(ref)
            console.print(f"    {uri.ospath if uri.isLocal else uri}", soft_wrap=True, highlight=False)


@click.command()
@click.argument("outdir", type=click.Path(file_okay=False, path_type=Path))
def main(outdir: Path) -> None:
    """Simulate, ingest and restore two patches in two bands in OUTDIR; what is there already is kept."""
    repo = outdir / "repo"
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        files = _simulate(outdir / "warps", repo)
    except OSError as err:
        raise click.ClickException(f"{outdir} cannot be written: {err}.") from None
    _run(_command("deepprior"), "ingest", repo, *files)
    _restore(repo)
    console = Console()
    with Butler.from_config(repo, collections=_OUTPUT) as butler:
        _print_places(console, butler)
        _print_table(console, pool(_gains(butler, outdir / "warps")))
    console.print(
        "The flux in the restored image is what the prior leaves of it; the catalogue adds what the residual "
        "holds. doc/lsst.coadd.deepprior/tutorial.rst explains the rows."
    )


if __name__ == "__main__":
    main()
