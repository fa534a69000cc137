# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The command ``deepprior estimate``."""

from __future__ import annotations

__all__ = ("estimate_command",)

import math
import shlex
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from .estimate import DEFAULT_CACHE_GIB, STARTS, Costs, Estimate, estimate, job_requests

_HOUR = 3600.0


def _visits(context: click.Context, parameter: click.Parameter, text: str) -> dict[str, int]:
    """Read ``20`` or ``g=8,r=18``."""
    try:
        parts = [part.split("=") for part in text.split(",")]
        visits = {
            "all" if len(part) == 1 else part[0].strip(): int(part[-1]) for part in parts if len(part) <= 2
        }
    except ValueError:
        visits = {}
    unnamed = "" in visits or (len(visits) > 1 and "all" in visits)
    if unnamed or len(visits) != len(text.split(",")) or min(visits.values(), default=0) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of visits nor a list like g=8,r=18.")
    return visits


def _size(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Refuse NaN, which a range does not."""
    if math.isnan(value):
        raise click.BadParameter("nan is no size.")
    return value


@click.command("estimate")
@click.option("--patch-size", default=3400, type=click.IntRange(min=1), help="Side of a patch in pixels.")
@click.option(
    "--visits", default="20", callback=_visits, help="Visits of a patch, one number or one a band: g=8,r=18."
)
@click.option("--patches", default=1, type=click.IntRange(min=1), help="Number of patches.")
@click.option("--start", default=STARTS[0], type=click.Choice(STARTS), help="The config field init.")
@click.option(
    "--cache-gib",
    default=DEFAULT_CACHE_GIB,
    show_default=True,
    type=click.FloatRange(min=0.0),
    callback=_size,
    help="The config field cache_gib.",
)
@click.option("--cache-on-disk", is_flag=True, help="The config field cache_dir names a directory.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="What restores.")
@click.option(
    "--costs",
    type=click.Path(path_type=Path),
    help="Constants that benchmarks/costs.py has measured on your machines, not those of the package.",
)
@click.option("--bps", is_flag=True, help="Print what batch jobs shall ask for, to be included by BPS.")
def estimate_command(
    patch_size: int,
    visits: dict[str, int],
    patches: int,
    start: str,
    cache_gib: float,
    cache_on_disk: bool,
    device: str,
    costs: Path | None,
    bps: bool,
) -> None:
    """Estimate time, memory and storage from measured constants.

    Hours are those of one core, or of one GPU where --device is cuda.  Memory and disk, for cache_dir, are
    those of one quantum; all else is for all PATCHES.
    """
    try:
        constants = Costs.read(start, device, costs)
    except ValueError as err:
        raise click.ClickException(str(err)) from None
    except OSError as err:
        raise click.ClickException(f"{err.filename} cannot be read: {err.strerror}.") from None
    if bps:
        deepest = max(visits.values())
        command = f"deepprior estimate --bps --patch-size {patch_size} --visits {deepest} --start {start}"
        if cache_gib != DEFAULT_CACHE_GIB:
            command += f" --cache-gib {cache_gib:g}"
        if cache_on_disk:
            command += " --cache-on-disk"
        if costs is not None:
            command += f" --costs {shlex.quote(str(costs))}"
        elif device != "cpu":
            command += f" --device {device}"
        click.echo(f"# {command}")
        click.echo("# requestMemory is in MiB, requestWalltime in minutes.\npipetask:")
        for label, requests in job_requests(patch_size, deepest, constants, cache_gib, cache_on_disk).items():
            click.echo(f"  {label}:")
            for name, value in requests.items():
                click.echo(f"    {name}: {value}")
        return
    table = Table(box=None)
    table.add_column("band")
    columns = ("visits", "restore h", "read h", "measure h", "memory GB", "disk GB", "warps GB", "outputs GB")
    for name in columns:
        table.add_column(name, justify="right")
    total = [0.0] * 5
    for band, n_visits in visits.items():
        one = estimate(patch_size, n_visits, constants, cache_gib, cache_on_disk)
        sums = _sums(one, patches)
        total = [a + b for a, b in zip(total, sums, strict=True)]
        table.add_row(band, str(n_visits), *_cells(sums, (one.memory_bytes, one.disk_bytes)))
    if len(visits) > 1:
        table.add_row("all", str(sum(visits.values())), *_cells(total, None))
    Console(width=110).print(table)


def _sums(one: Estimate, patches: int) -> list[float]:
    """Return hours of restoring, reading and measuring, and GB of warps and outputs, of all patches."""
    hours = [seconds / _HOUR for seconds in (one.seconds, one.seconds_read, one.seconds_after)]
    return [patches * value for value in (*hours, one.warp_bytes / 1e9, one.output_bytes / 1e9)]


def _cells(sums: list[float], quantum: tuple[float, float] | None) -> list[str]:
    """Write the numbers of a row."""
    texts = [f"{value:,.0f}" if value >= 100.0 else f"{value:.2g}" for value in sums]
    middle = ["", ""] if quantum is None else [f"{size / 1e9:.1f}" for size in quantum]
    return [*texts[:3], *middle, *texts[3:]]
