# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The commands that train networks and put them into a Butler."""

from __future__ import annotations

__all__ = ("Report", "ingest_network_command", "show_progress", "train_command")

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .checkpoint import CheckpointError, write_atomically
from .ingest import DEFAULT_RUN, IngestError
from .network_dataset import DEFAULT_NETWORK_RUN, NetworkIngestError, ingest_network
from .numerical_settings import MAX_SEED
from .progress import ProgressLines
from .psf import SAMPLED_FWHM
from .training_data import TrainingDataError, butler_data, file_data, scene_data
from .training_run import check_checkpoint, train_network
from .warp_files import InvalidWarpFileError
from .warps import InvalidWarpError

_REFUSALS = (CheckpointError, IngestError, InvalidWarpError, InvalidWarpFileError, TrainingDataError)
"""Errors whose message says all that a user needs."""


class Report(Protocol):
    """Shows the phase, the step, the number of steps, and the loss where there is one."""

    def __call__(self, phase: str, step: int, n_steps: int, loss: float = math.nan) -> None:
        """Show them."""


@contextlib.contextmanager
def show_progress() -> Iterator[Report]:
    """Show loss and time left on standard error: as bars on a terminal, as lines otherwise.

    Yields
    ------
    report : `Report`
        What the training calls.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(partial(click.echo, err=True))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, step: int, n_steps: int, loss: float = math.nan) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=n_steps, completed=step, loss="")
            bars.update(tasks[phase], completed=step, loss="" if math.isnan(loss) else f"loss {loss:.5g}")

        yield report


@click.command("train")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("files", nargs=-1, metavar="[FILE...]", type=click.Path(path_type=Path))
@click.option("--repo", help="Butler repository with warps.")
@click.option("--collection", default=DEFAULT_RUN, help="Collection of the warps in the repository.")
@click.option("--scenes", type=click.IntRange(min=1), help="Number of scenes to simulate.")
@click.option("--steps", default=40000, type=click.IntRange(min=1), help="Number of steps.")
@click.option("--seed", default=1, type=click.IntRange(0, MAX_SEED), help="Seed of all random numbers.")
@click.option(
    "--target-fwhm",
    type=click.FloatRange(min=SAMPLED_FWHM),
    metavar="PIXELS",
    help="FWHM of the PSF of the restored images, by default what the restoration chooses for each patch; "
    "give what it will be configured with.",
)
@click.option(
    "--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute."
)
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that an interrupted training continues from, OUTPUT.checkpoint by default.",
)
def train_command(
    output: Path,
    files: tuple[Path, ...],
    repo: str | None,
    collection: str,
    scenes: int | None,
    steps: int,
    seed: int,
    target_fwhm: float | None,
    device: str,
    checkpoint: Path | None,
) -> None:
    """Train a network and write it to OUTPUT.

    It learns from the warps of a Butler repository (--repo), from warp FILEs, or from simulated scenes
    (--scenes), and from nothing but their pixels: no truth is used.  An interrupted training continues where
    it was when the same command is given again; a finished one is not made anew as long as OUTPUT exists.
    """
    if scenes is not None and target_fwhm is not None:
        raise click.UsageError("Scenes have their own target PSFs; leave out --target-fwhm.")
    if (repo is not None) + bool(files) + (scenes is not None) != 1:
        raise click.UsageError("Give one of --repo, warp FILEs, and --scenes.")
    given = click.get_current_context().get_parameter_source("collection")
    if repo is None and given is not ParameterSource.DEFAULT:
        raise click.UsageError("--collection is one of a repository; give --repo, too.")
    checkpoint = checkpoint or output.with_name(f"{output.name}.checkpoint")
    _check_different(output, checkpoint, files)
    for path in (output, checkpoint):
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise click.ClickException(f"{path} cannot be written: {path.parent} is no writable folder.")
    if output.exists() and not checkpoint.exists():
        raise click.ClickException(
            f"{output} exists, and there is no {checkpoint} to continue from; remove it to train anew, or "
            "name another file."
        )
    import torch

    from .training import TrainSettings
    from .weights import InvalidNetworkError

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch finds no GPU here; use --device cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TrainSettings(steps=steps, seed=seed)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(show_progress())
        try:
            check_checkpoint(checkpoint, settings)
            if scenes is not None:
                data = scene_data(scenes, seed, report)
                source = ["--scenes", str(scenes)]
            elif repo is not None:
                data = stack.enter_context(butler_data(repo, collection, target_fwhm, report))
                source = ["--repo", "REPO", "--collection", collection]
            else:
                data = stack.enter_context(file_data(files, target_fwhm, report))
                source = ["FILE..."]
            if target_fwhm is not None:
                source += ["--target-fwhm", str(target_fwhm)]
            command = ["deepprior train OUTPUT", *source, "--seed", str(seed), "--steps", str(steps)]
            card = {"name": output.stem, "command": " ".join(command)}
            for reason in data.left_out:
                print(reason, file=sys.stderr)  # above the bars, where click writes into them
            network = train_network(data, settings, checkpoint, card, device=device, progress=report)
            write_atomically(output, network.to_bytes())
            checkpoint.unlink(missing_ok=True)
        except _REFUSALS as err:
            raise click.ClickException(str(err)) from None
        except (FloatingPointError, InvalidNetworkError) as err:
            raise click.ClickException(f"The training has failed: {err}") from None
        except OSError as err:
            raise click.ClickException(
                f"{err.filename or 'A file'} cannot be read or written: {err.strerror or err}."
            ) from None
    click.echo(f"The network {network.name} of {data.description} is in {output}.")


def _check_different(output: Path, checkpoint: Path, files: Iterable[Path]) -> None:
    """Refuse to write to a file that is read."""
    sources = {file.resolve() for file in files}
    for option, path in (("OUTPUT", output), ("The checkpoint", checkpoint)):
        if path.resolve() in sources:
            raise click.UsageError(f"{option}, {path}, is one of the warp FILEs; name another file.")
    if output.resolve() == checkpoint.resolve():
        raise click.UsageError(f"OUTPUT and the checkpoint are one file, {output}; name two.")


@click.command("ingest-network")
@click.argument("repo")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--run", default=DEFAULT_NETWORK_RUN, help="Collection to write the network to.")
def ingest_network_command(repo: str, file: Path, run: str) -> None:
    """Put the network FILE that `deepprior train` made into the Butler repository REPO."""
    from .weights import InvalidNetworkError, TrainedNetwork

    try:
        network = TrainedNetwork.from_bytes(file.read_bytes())
        is_new = ingest_network(repo, network, run=run)
    except OSError as err:
        raise click.ClickException(f"{file} cannot be read: {err.strerror}.") from None
    except InvalidNetworkError as err:
        raise click.ClickException(f"{file}: {err}") from None
    except NetworkIngestError as err:
        raise click.ClickException(str(err)) from None
    click.echo(f"The network {network.name} is {'now' if is_new else 'already'} in {run} of {repo}.")
