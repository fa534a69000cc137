# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The fit of a network to the visits of one patch, from a random start."""

from __future__ import annotations

__all__ = ("fit_scratch",)

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .batches import Batches
from .fit import N_TURNS, SplitLoss, WeightAverage, load_weights_state, make_trunk, one_cycle, weights_state
from .groups import deal_splits
from .network import Trunk
from .numerical_settings import MAX_SEED
from .parallel import operations_in_parallel
from .patch_data import PatchData
from .windows import fit_windows

if TYPE_CHECKING:
    from .fit_checkpoint import FitCheckpoint
    from .fitted_patch import RestoreSettings

_AVERAGING = 0.99
"""Decay of the running mean of the weights, which is the network that is used."""

_ATTEMPTS = 3
"""Number of random starts that a fit may need."""

_LOG = logging.getLogger(__name__)


def fit_scratch(
    data: PatchData,
    settings: RestoreSettings,
    progress: Callable[[str, int, int, float], None] | None = None,
    checkpoint: FitCheckpoint | None = None,
    batches: Batches | None = None,
    is_sound: Callable[[Trunk], bool] = lambda net: True,
) -> tuple[Trunk | None, list[tuple[int, float]]]:
    """Fit a network with a random start to the splits of a patch, or of windows of a large one.

    A fit may end with a network that is dark, since too large a step has put its units out for good. Then it
    is begun anew from another random start.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        Two groups of visits at least.
    settings : `~lsst.coadd.deepprior.fitted_patch.RestoreSettings`
        Numerical settings.
    progress : `~collections.abc.Callable`, optional
        Called with the phase, the step, the number of steps and the loss.
    checkpoint : `~lsst.coadd.deepprior.fit_checkpoint.FitCheckpoint`, optional
        Where the state of the fit is kept, and goes on from if there is one.
    batches : `~lsst.coadd.deepprior.batches.Batches`, optional
        How many splits are prepared and linearised at once.
    is_sound : `~collections.abc.Callable`, optional
        Tells whether a network can be used.

    Returns
    -------
    net : `~lsst.coadd.deepprior.network.Trunk` or `None`
        The network, with the running mean of its weights; `None` if none of three was sound.
    curve : `list` [`tuple` [`int`, `float`]]
        Steps, and the objective of the visits that the encoder did not read.

    Raises
    ------
    FloatingPointError
        Raised if the fit diverged.
    CheckpointError
        Raised if the state is that of another fit.
    """
    stored = checkpoint.load() if checkpoint is not None else None
    first = 0 if stored is None else int(stored.pop("attempt", torch.tensor(0)))
    for attempt in range(first, _ATTEMPTS):
        own = dataclasses.replace(settings, seed=(settings.seed + attempt) % (MAX_SEED + 1))
        net, curve = _fit(data, own, progress, checkpoint, batches, stored, attempt)
        if is_sound(net):
            return net, curve
        stored = None
        _LOG.warning("Fit %d of at most %d has lost the light of bright sources.", attempt + 1, _ATTEMPTS)
    return None, curve


def _fit(
    data: PatchData,
    settings: RestoreSettings,
    progress: Callable[[str, int, int, float], None] | None,
    checkpoint: FitCheckpoint | None,
    batches: Batches | None,
    stored: dict[str, torch.Tensor] | None,
    attempt: int,
) -> tuple[Trunk, list[tuple[int, float]]]:
    """Fit one network, from a random start or from where it was."""
    generator = torch.Generator().manual_seed(settings.seed)
    parts = fit_windows(data, settings.seed)
    n_splits = max(1, settings.n_splits // len(parts))
    losses = [
        SplitLoss(part, *deal_splits(part.n_groups, n_splits, generator), settings.base_steps, batches)
        for part in parts
    ]
    examples = [(loss, split) for loss in losses for split in range(len(loss))]
    net = make_trunk(settings.seed, data.device, data.dtype)
    average = WeightAverage(net, _AVERAGING)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    curve: list[tuple[int, float]] = []
    order: list[int] = []
    linearised: dict[str, torch.Tensor] = {}
    first = 0

    def refresh(step: int) -> None:
        held_out = sum(loss.refresh(net) for loss in losses) / len(losses)
        linearised.update({f"linearised.{name}": p.detach().clone() for name, p in net.named_parameters()})
        curve.append((step, held_out))
        if not math.isfinite(held_out):
            raise FloatingPointError(f"The fit diverged at step {step}; lower the learning rate.")
        if progress is not None:
            progress("fit", step, settings.steps, held_out)

    def state() -> dict[str, torch.Tensor]:
        return {
            "generator": generator.get_state(),
            "order": torch.tensor(order, dtype=torch.int64),
            "curve": torch.tensor(curve, dtype=torch.float64),
            "attempt": torch.tensor(attempt),
            **linearised,
            **weights_state(net, average, optimizer),
        }

    if stored is not None:
        first = int(stored["step"])
        # The statistics are those of the weights at which they were linearised.
        linearised.update({name: t for name, t in stored.items() if name.startswith("linearised.")})
        net.load_state_dict({name.removeprefix("linearised."): t for name, t in linearised.items()})
        for loss in losses:
            loss.refresh(net)
        load_weights_state(stored, net, average, optimizer, first)
        generator.set_state(stored["generator"])
        order = stored["order"].tolist()
        curve = [(int(step), value) for step, value in stored["curve"].tolist()]
    guard = checkpoint.guard() if checkpoint is not None else contextlib.nullcontext()
    with guard, operations_in_parallel():
        for step in range(first, settings.steps):
            if step % settings.refresh_every == 0:
                refresh(step)
            if not order:
                order = torch.randperm(len(examples), generator=generator).tolist()
            optimizer.param_groups[0]["lr"] = settings.learning_rate * one_cycle(step, settings.steps)
            optimizer.zero_grad(set_to_none=True)
            loss, split = examples[order.pop()]
            loss.backward(net, split, int(torch.randint(N_TURNS, (1,), generator=generator)))
            optimizer.step()
            average.update(net, step)
            if checkpoint is not None:
                checkpoint.keep(step + 1, settings.steps, state())
    average.copy_to(net)
    refresh(settings.steps)
    return net, curve
