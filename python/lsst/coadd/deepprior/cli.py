# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The ``deepprior`` command."""

from __future__ import annotations

__all__ = ("main",)

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import sqlalchemy.exc
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from lsst.daf.butler.registry import CollectionTypeError, ConflictingDefinitionError

from . import __version__
from .estimate_command import estimate_command
from .finer_skymap_dataset import DEFAULT_FINER_SKYMAP_RUN, register_finer_skymap
from .ingest import DEFAULT_RUN, DEFAULT_SKYMAP, IngestError, ingest_warp_files
from .progress import counted
from .repositories import RepositoryError, check_run_name, open_repository
from .simulate import MAX_VISITS, SceneConfig, write_scene
from .train_command import ingest_network_command, train_command
from .truth import BANDS
from .warp_files import InvalidWarpFileError
from .warps import InvalidWarpError


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on standard error: as bars on a terminal, as lines otherwise.

    Yields
    ------
    report : `~collections.abc.Callable`
        Function of the phase, the number of files done, and the number of files.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_progress
        return
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, n_done: int, n_files: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=n_files)
            bars.update(tasks[phase], completed=n_done, total=n_files)

        yield report


def _print_progress(phase: str, n_done: int, n_files: int) -> None:
    """Print some ten lines for each phase."""
    if n_done % math.ceil(n_files / 10) == 0 or n_done == n_files:
        click.echo(f"{phase}: {n_done} of {n_files} files", err=True)


@click.group(context_settings={"show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Restored coadds of Rubin warps: warps in, from simulation or from files, and networks trained on them.

    The restoration itself is a pipeline; run it with pipetask.
    """


main.add_command(estimate_command)
main.add_command(train_command)
main.add_command(ingest_network_command)


@main.command()
@click.argument("repo")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--run", default=DEFAULT_RUN, help="Collection to write the warps to.")
@click.option("--skymap", default=DEFAULT_SKYMAP, help="Skymap of the files that name none.")
def ingest(repo: str, files: tuple[Path, ...], run: str, skymap: str) -> None:
    """Ingest warp FILEs into the Butler repository REPO.

    The repository and all of its dimension records are made if absent.  All files are checked first; if one
    of them is refused, nothing is written.  Files that are in the collection already are skipped.

    A REPO that is named by a URI or an alias, and not by a path, must be there.
    """
    try:
        with _progress() as report:
            result = ingest_warp_files(repo, files, run=run, skymap=skymap, progress=report)
    except (InvalidWarpFileError, InvalidWarpError, IngestError) as err:
        raise click.ClickException(str(err)) from None
    click.echo(
        f"{counted(result.n_ingested, 'warp', 'warps')} of {counted(result.n_patches, 'patch', 'patches')} "
        f"ingested into {result.run} of {repo}; {counted(result.n_skipped, 'was', 'were')} there already."
    )


@main.command()
@click.argument("repo")
@click.option("--skymap", default=DEFAULT_SKYMAP, help="Skymap of the warps.")
@click.option("--oversampling", default="2", type=click.Choice(["2", "3"]), help="How many times finer.")
@click.option("--run", default=DEFAULT_FINER_SKYMAP_RUN, help="Collection that tells pipelines of it.")
def finer_skymap(repo: str, skymap: str, oversampling: str, run: str) -> None:
    """Register a skymap with finer pixels in the Butler repository REPO.

    It has the tracts and patches of the skymap of the warps, and its name with _x2 or _x3 behind it. Run this
    again when patches have been added; what is there already stays. If the finer pixels get a skyMap dataset
    too, register the sky map first, then run this.
    """
    try:
        check_run_name(run)
        with open_repository(repo, writeable=True) as butler:
            name, n_patches = register_finer_skymap(butler, skymap, int(oversampling), run)
    except (RepositoryError, ValueError) as err:
        raise click.ClickException(str(err)) from None
    except (ConflictingDefinitionError, CollectionTypeError) as err:
        raise click.ClickException(f"The repository {repo} cannot take a skymap in {run}: {err}") from None
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as err:
        reason = str(getattr(err, "orig", err)).strip().rstrip(".")
        raise click.ClickException(f"The repository {repo} cannot be written: {reason}.") from None
    click.echo(f"The skymap {name} of {repo} has {counted(n_patches, 'patch', 'patches')}.")


@main.command()
@click.argument("outdir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--patches", default=2, type=click.IntRange(min=1), help="Number of patches, side by side.")
@click.option("--bands", default="r,i", help=f"Bands, separated by commas, out of {','.join(BANDS)}.")
@click.option(
    "--visits",
    default=12,
    type=click.IntRange(1, MAX_VISITS),
    help="Number of visits per patch and band.",
)
@click.option(
    "--cells", nargs=2, default=(2, 2), type=click.IntRange(min=1), help="Rows and columns of cells."
)
@click.option("--cell-size", default=150, type=click.IntRange(min=16), help="Width of a cell in pixels.")
@click.option("--seed", default=1, type=click.IntRange(min=0), help="Seed of all random numbers.")
def simulate(
    outdir: Path, patches: int, bands: str, visits: int, cells: tuple[int, int], cell_size: int, seed: int
) -> None:
    """Simulate warp files of a scene with known truth in OUTDIR.

    Files are named warp_PATCH_BAND_VISIT.fits; the true objects are in truth_PATCH_BAND.ecsv. OUTDIR must not
    hold such files yet.
    """
    chosen = [band.strip() for band in bands.split(",") if band.strip()]
    if not chosen or not BANDS.keys() >= set(chosen):
        raise click.BadParameter(f"choose from {','.join(BANDS)}.", param_hint="--bands")
    if len(set(chosen)) < len(chosen):
        raise click.BadParameter(f"{bands!r} names a band twice.", param_hint="--bands")
    if older := sorted([*outdir.glob("warp_*.fits"), *outdir.glob("truth_*.ecsv")]):
        raise click.ClickException(
            f"{outdir} holds files of another scene, {older[0].name} for instance; name another directory, "
            "or remove them."
        )
    start = SceneConfig().start
    n_files = 0
    try:
        with _progress() as report:
            for patch in range(patches):
                config = SceneConfig(
                    seed=seed,
                    patch_id=patch,
                    n_cells=cells,
                    cell_shape=(cell_size, cell_size),
                    start=(start[0], start[1] + patch * cells[1] * cell_size),
                    n_visits=visits,
                )
                phase = f"simulating patch {patch}"
                written = write_scene(outdir, config, chosen, progress=partial(report, phase))
                n_files += len(written)
    except OSError as err:
        raise click.ClickException(f"The files cannot be written: {err}.") from None
    files = counted(n_files, "warp file", "warp files")
    click.echo(f"{files} of {counted(patches, 'patch', 'patches')} and their truth are in {outdir}.")


if __name__ == "__main__":
    main()
