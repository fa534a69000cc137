# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""A training that can be interrupted at any time and continued."""

from __future__ import annotations

__all__ = ("check_checkpoint", "train_network")

import dataclasses
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from .training_data import TrainingData, TrainingDataError

if TYPE_CHECKING:
    from .training import TrainSettings
    from .weights import TrainedNetwork

_ADVICE = "Remove it to start anew, or name another file with --checkpoint."


def _facts(settings: TrainSettings) -> dict[str, Any]:
    """Return what a training belongs to besides its patches."""
    return {"settings": dataclasses.asdict(settings), "deepprior_version": __version__}


def check_checkpoint(checkpoint: Path, settings: TrainSettings) -> None:
    """Refuse a checkpoint from which a training cannot go on, as far as that can be told without its patches.

    Parameters
    ----------
    checkpoint : `~pathlib.Path`
        The file; it need not be there.
    settings : `~lsst.coadd.deepprior.training.TrainSettings`
        Settings of the training.

    Raises
    ------
    CheckpointError
        Raised if the checkpoint is damaged, or belongs to other settings or versions.
    """
    read_checkpoint(checkpoint, _facts(settings), owner="a training", advice=_ADVICE, are_all_facts=False)


def train_network(
    data: TrainingData,
    settings: TrainSettings,
    checkpoint: Path,
    card: dict[str, str],
    *,
    device: str,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> TrainedNetwork:
    """Train a network, or continue its training.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.training_data.TrainingData`
        The patches.
    settings : `~lsst.coadd.deepprior.training.TrainSettings`
        Settings of the training.
    checkpoint : `~pathlib.Path`
        File that the state of the training is written to, and read from where it exists.
    card : `dict` [`str`, `str`]
        What the network shall say of itself besides what it was trained on and how.
    device : `str`
        Device to compute on.
    progress : `~collections.abc.Callable`, optional
        Called with the name of the phase, the step, the number of steps and the loss.

    Returns
    -------
    network : `~lsst.coadd.deepprior.weights.TrainedNetwork`
        The network.

    Raises
    ------
    CheckpointError
        Raised if the checkpoint is damaged, or belongs to other data, settings, or versions.
    TrainingDataError
        Raised if the data cannot be trained on, or a warp cannot be read any more.
    FloatingPointError
        Raised if the training diverged.
    OSError
        Raised if the checkpoint cannot be written.
    """
    from .training import Trainer

    facts = _facts(settings) | {"patches": data.fingerprint}
    state = read_checkpoint(checkpoint, facts, owner="a training", advice=_ADVICE)
    report = progress if progress is not None else lambda *_: None
    try:
        trainer = Trainer(
            data.patches,
            settings,
            device=device,
            progress=lambda n_done, n_patches: report("preparing patches", n_done, n_patches, math.nan),
        )
    except ValueError as err:
        raise TrainingDataError(f"The data cannot be trained on: {err}") from err
    if state is not None:
        try:
            trainer.load_state(state)
        except ValueError as err:
            raise CheckpointError(f"{checkpoint} cannot be continued: {err} {_ADVICE}") from err
    trainer.run(
        lambda step, n_steps, loss: report("training", step, n_steps, loss),
        lambda state: write_checkpoint(checkpoint, state, facts),
    )
    return trainer.network(
        card
        | {
            "patches": data.description,
            "settings": json.dumps(facts["settings"], sort_keys=True),
            "device": device,
            "deepprior_version": __version__,
            "torch_version": version("torch"),
        }
    )
