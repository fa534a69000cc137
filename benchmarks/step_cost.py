# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What a step of the fit costs with 8, 32 and 128 visits.

    python benchmarks/step_cost.py

makes patches of 2 x 2 cells of 80 pixels with PSFs that change from cell to cell, and prints for every number
of visits the time of a step of optimisation (the gradient of one split, and Adam), of a refresh, which reads
all visits, and of the preparation, all in seconds, and the peak memory of a process of its own in MiB. Visits
are made whenever they are read, so the memory is that of the fit. Times of steps are medians of repeats that
take turns with the numbers of visits, so that a change of the machine's load touches all alike; that of a
refresh is the shorter of two. The last line is the ratio of the slowest to the fastest step, which should be
below 1.3. It takes about two minutes on one core.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Sequence

import click
import numpy as np
import torch

from lsst.coadd.deepprior.fit import SplitLoss, make_trunk
from lsst.coadd.deepprior.groups import deal_splits
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import gaussian_stamp

LAYOUT = CellLayout(2, 2, 80, 80)
STAMP = 31
"""Width of the PSF stamps in pixels."""

SIGMA = 0.9
"""Sigma of the target PSF in pixels."""

N_SPLITS = 8
BASE_STEPS = 5
"""Few, since the features are no part of a step."""

LEARNING_RATE = 2e-3


class EmptyVisits(Sequence[Observation]):
    """Visits of white noise that are made when they are read."""

    def __init__(self, n_visits: int) -> None:
        self._n_visits = n_visits

    def __len__(self) -> int:
        return self._n_visits

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        if not 0 <= index < self._n_visits:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        sigma = 1.5 + 0.7 * rng.random()
        stamps = [gaussian_stamp(sigma * (1.0 + 0.02 * cell), STAMP) for cell in range(4)]
        return Observation(
            flux=rng.standard_normal(LAYOUT.shape, dtype=np.float32),
            variance=np.ones(LAYOUT.shape, dtype=np.float32),
            good=rng.random(LAYOUT.shape) > 0.02,
            psf=np.reshape(stamps, (LAYOUT.n_i, LAYOUT.n_j, STAMP, STAMP)),
            origin=(0, 0),
            name=f"visit {index}",
        )


class Fit:
    """The fit of a network to a number of visits, and the time of its parts."""

    def __init__(self, n_visits: int) -> None:
        started = time.perf_counter()
        data = PatchData(EmptyVisits(n_visits), LAYOUT, SIGMA)
        sides = deal_splits(data.n_groups, N_SPLITS, torch.Generator().manual_seed(1))
        self._loss = SplitLoss(data, *sides, BASE_STEPS)
        self._net = make_trunk(1, data.device, data.dtype)
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=LEARNING_RATE)
        self.preparation = time.perf_counter() - started

    def refresh(self) -> float:
        """Linearise the loss and return the seconds that it took."""
        started = time.perf_counter()
        self._loss.refresh(self._net)
        return time.perf_counter() - started

    def steps(self, n_steps: int) -> float:
        """Take steps and return the seconds of one."""
        started = time.perf_counter()
        for step in range(n_steps):
            self._optimizer.zero_grad(set_to_none=True)
            self._loss.backward(self._net, step % len(self._loss), step % 8)
            self._optimizer.step()
        return (time.perf_counter() - started) / n_steps


def _peak_memory(n_visits: int, queue: multiprocessing.Queue) -> None:
    """Run a fit for its memory (MiB)."""
    torch.set_num_threads(1)
    fit = Fit(n_visits)
    fit.refresh()
    fit.steps(2)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0)


def peak_memory(n_visits: int) -> float:
    """Return the peak memory of a new process that runs a fit (MiB; ``ru_maxrss`` is in KiB on Linux)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_memory, args=(n_visits, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise click.ClickException(f"The fit to {n_visits} visits ended with status {process.exitcode}.")
    return queue.get()


@click.command(help=__doc__)
@click.option("--visits", multiple=True, type=click.IntRange(min=2), default=(8, 32, 128), show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Steps of a repeat.")
def main(visits: tuple[int, ...], repeats: int, steps: int) -> None:  # noqa: D103
    torch.set_num_threads(1)
    fits = [Fit(n_visits) for n_visits in visits]
    refreshes = np.array([[fit.refresh() for fit in fits] for _ in range(2)])
    for fit in fits:
        fit.steps(2)
    times = np.array([[fit.steps(steps) for fit in fits] for _ in range(repeats)])
    step = np.median(times, axis=0)
    click.echo(f"{'visits':>8}{'step s':>10}{'refresh s':>12}{'prepare s':>12}{'peak MiB':>10}")
    for index, n_visits in enumerate(visits):
        refresh, memory = refreshes[:, index].min(), peak_memory(n_visits)
        click.echo(
            f"{n_visits:>8}{step[index]:>10.4f}{refresh:>12.2f}{fits[index].preparation:>12.2f}{memory:>10.0f}"
        )
    click.echo(f"slowest over fastest step: {step.max() / step.min():.2f}")


if __name__ == "__main__":
    main()
