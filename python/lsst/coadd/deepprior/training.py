# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Training of a network on many patches, so that it can restore others without a step of fitting.

No truth is used: the network learns from the visits of every patch what it would learn from those of one
patch, to predict visits that it has not read.
"""

from __future__ import annotations

__all__ = ("TrainSettings", "Trainer", "TrainingPatch")

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .baselines import maximum_likelihood
from .conditions import AXES, patch_conditions
from .fit import (
    N_TURNS,
    SplitLoss,
    WeightAverage,
    load_weights_state,
    make_trunk,
    one_cycle,
    weights_state,
)
from .fitted_patch import MARGIN
from .groups import deal_splits
from .numerical_settings import check_settings
from .observation import Observation
from .operators import CellLayout
from .patch_data import PatchData
from .psf import target_sigma
from .weights import TrainedNetwork

_AVERAGING = 0.999
"""Decay of the running mean of the weights."""

_ADAM_DECAYS = (0.9, 0.99)

_RECENT = 100
"""Number of linearisations over which the reported loss is averaged."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingPatch:
    """A patch to learn from.

    Parameters
    ----------
    name : `str`
        What it is called in messages.
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        Its visits, two with a good pixel at least.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Its cells.
    target_fwhm : `float` or `None`
        FWHM of the target PSF in pixels; `None` is the default of a restoration.
    """

    name: str
    observations: Sequence[Observation]
    layout: CellLayout
    target_fwhm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Numerical settings of a training.

    Parameters
    ----------
    steps : `int`
        Number of steps, each on one split of one patch.
    learning_rate : `float`
        Largest learning rate of Adam.
    n_splits : `int`
        Number of ways in which the visits of a patch are split.
    refresh_every : `int`
        Steps on a patch after which its visits are read again to linearise its loss anew; this is also done
        after every ``checkpoint_every`` steps of all.
    checkpoint_every : `int`
        Steps between two states from which the training can go on.
    base_steps : `int`
        Steps of maximum likelihood behind the base that the network corrects.
    huber_delta : `float`
        Threshold of the Huber loss in standard deviations.
    psf_error : `float`
        Relative error of the PSF models, a part of the predicted flux.
    seed : `int`
        Seed of all random numbers.
    """

    steps: int = 40000
    learning_rate: float = 1e-3
    n_splits: int = 4
    refresh_every: int = 24
    checkpoint_every: int = 2000
    base_steps: int = 240
    huber_delta: float = 1.5
    psf_error: float = 0.01
    seed: int = 1

    def __post_init__(self) -> None:
        counts = ("steps", "n_splits", "refresh_every", "checkpoint_every", "base_steps")
        check_settings(self, dict.fromkeys(counts, 1))


class Trainer:
    """Training of a network on patches.

    Parameters
    ----------
    patches : `~collections.abc.Sequence` [`TrainingPatch`]
        The patches; their visits stay in memory as long as the trainer.
    settings : `TrainSettings`
        Numerical settings.
    device : `torch.device` or `str`, optional
        Where to compute.
    progress : `~collections.abc.Callable`, optional
        Called with the number of patches prepared and their number.

    Raises
    ------
    ValueError
        Raised if there is no patch, or one has fewer than two visits with a good pixel.
    """

    def __init__(
        self,
        patches: Sequence[TrainingPatch],
        settings: TrainSettings = TrainSettings(),
        *,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not patches:
            raise ValueError("A network cannot be trained without a patch.")
        self.settings = settings
        self._losses: list[SplitLoss] = []
        self._conditions: list[dict[str, float]] = []
        for index, patch in enumerate(patches):
            self._add(patch, index, torch.device(device))
            if progress is not None:
                progress(index + 1, len(patches))
        self._examples = [(p, split) for p, loss in enumerate(self._losses) for split in range(len(loss))]
        self._net = make_trunk(settings.seed, torch.device(device), torch.float32)
        self._average = WeightAverage(self._net, _AVERAGING)
        self._optimizer = torch.optim.Adam(
            self._net.parameters(), lr=settings.learning_rate, betas=_ADAM_DECAYS
        )
        self.step = 0
        """Number of steps done (`int`)."""

    def _add(self, patch: TrainingPatch, index: int, device: torch.device) -> None:
        """Prepare the splits and features of a patch."""
        settings = self.settings
        seeing = [fwhm for fwhm in (o.seeing() for o in patch.observations) if math.isfinite(fwhm)]
        if len(seeing) < 2:
            raise ValueError(f"{patch.name} has {len(seeing)} visits with a PSF; training takes two or more.")
        data = PatchData(
            patch.observations,
            patch.layout,
            target_sigma(seeing, patch.target_fwhm),
            margin=MARGIN,
            huber_delta=settings.huber_delta,
            psf_error=settings.psf_error,
            device=device,
        )
        if data.n_groups < 2:
            raise ValueError(f"{patch.name} has one visit with a good pixel; training takes two or more.")
        generator = torch.Generator().manual_seed(settings.seed * 100003 + index)
        encoder, loss = deal_splits(data.n_groups, settings.n_splits, generator)
        self._losses.append(SplitLoss(data, encoder, loss, settings.base_steps))
        solution = maximum_likelihood(data, data.sets(), steps=settings.base_steps)
        conditions = patch_conditions(data, solution, settings.base_steps)
        n_read = [np.isin(data.group, np.flatnonzero(side.numpy())).sum() for side in encoder]
        self._conditions += [conditions, conditions | {"n_visits": float(min(n_read))}]

    def run(
        self,
        progress: Callable[[int, int, float], None] | None = None,
        checkpoint: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> None:
        """Train until all steps are done.

        Parameters
        ----------
        progress : `~collections.abc.Callable`, optional
            Called after every step with the number of steps done, their number, and the recent mean of the
            robust loss of visits that the network did not read.
        checkpoint : `~collections.abc.Callable`, optional
            Called with `state` every ``checkpoint_every`` steps.

        Raises
        ------
        FloatingPointError
            Raised if the training diverged.
        """
        settings = self.settings
        recent: list[float] = []
        age = [settings.refresh_every] * len(self._losses)
        while self.step < settings.steps:
            if self.step % settings.checkpoint_every == 0:
                # Also without a checkpoint, so that a resumed training takes the same steps.
                age = [settings.refresh_every] * len(self._losses)
            patch, split, turn = self._example(self.step)
            if age[patch] >= settings.refresh_every:
                recent = [*recent[1 - _RECENT :], self._losses[patch].refresh(self._net)]
                age[patch] = 0
                if not math.isfinite(recent[-1]):
                    raise FloatingPointError(
                        f"The training diverged at step {self.step}; lower the learning rate."
                    )
            age[patch] += 1
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate * one_cycle(self.step, settings.steps)
            self._optimizer.zero_grad(set_to_none=True)
            self._losses[patch].backward(self._net, split, turn)
            self._optimizer.step()
            self._average.update(self._net, self.step)
            self.step += 1
            if progress is not None:
                progress(self.step, settings.steps, float(np.mean(recent)))
            if checkpoint is not None and self.step % settings.checkpoint_every == 0:
                checkpoint(self.state())

    def _example(self, step: int) -> tuple[int, int, int]:
        """Return patch, split and turn of a step; every epoch takes each split of each patch once."""
        epoch, place = divmod(step, len(self._examples))
        rng = np.random.default_rng([self.settings.seed, epoch])
        patch, split = self._examples[rng.permutation(len(self._examples))[place]]
        return patch, split, int(rng.integers(N_TURNS, size=len(self._examples))[place])

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all that changes in the training (`dict` [`str`, `torch.Tensor`])."""
        return {"step": torch.tensor(self.step)} | weights_state(self._net, self._average, self._optimizer)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a state.

        Parameters
        ----------
        state : `dict` [`str`, `torch.Tensor`]
            What `state` returned in a training of the same patches and settings.

        Raises
        ------
        ValueError
            Raised if the state is of another network.
        """
        expected = {name: tensor.shape for name, tensor in self.state().items()}
        if {name: tensor.shape for name, tensor in state.items()} != expected:
            raise ValueError("The state of the training is of another network.")
        self.step = int(state["step"])
        load_weights_state(state, self._net, self._average, self._optimizer, self.step)

    def network(self, card: dict[str, str]) -> TrainedNetwork:
        """Return the trained network: the mean weights, and the ranges of the conditions of the patches.

        Parameters
        ----------
        card : `dict` [`str`, `str`]
            How it was made.

        Returns
        -------
        network : `~lsst.coadd.deepprior.weights.TrainedNetwork`
            The network. Its number of visits goes from the fewest that it read, without those of the loss,
            to the most that a patch had.
        """
        trunk = make_trunk(self.settings.seed, torch.device("cpu"), torch.float32)
        self._average.copy_to(trunk)
        ranges = {
            axis: (min(c[axis] for c in self._conditions), max(c[axis] for c in self._conditions))
            for axis in AXES
        }
        return TrainedNetwork(trunk, ranges, card)
