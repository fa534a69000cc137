# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""A training that can be interrupted at any time and continued."""

from __future__ import annotations

__all__ = ("CheckpointError", "train_network", "write_atomically")

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .training_data import TrainingData, TrainingDataError

if TYPE_CHECKING:
    import torch

    from .training import TrainSettings
    from .weights import TrainedNetwork

_HEADER_KEY = "deepprior"
"""The entry of the safetensors metadata of a checkpoint that says what it belongs to."""

_DIGEST = "sha256"
"""The entry of this header with the checksum of the tensors."""

_ADVICE = "Remove it to start anew, or name another file with --checkpoint."


class CheckpointError(RuntimeError):
    """Raised for a checkpoint that cannot be continued; the message says why and what to do."""


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

    facts = {
        "settings": dataclasses.asdict(settings),
        "patches": data.fingerprint,
        "deepprior_version": __version__,
    }
    state = _read_checkpoint(checkpoint, facts)
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
        lambda state: _write_checkpoint(checkpoint, state, facts),
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


def _write_checkpoint(path: Path, state: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write the state of a training, with what it belongs to."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = json.dumps(facts | {_DIGEST: _digest(tensors)})
    write_atomically(path, safetensors.torch.save(tensors, {_HEADER_KEY: header}))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of names, types, shapes and values."""
    import safetensors.torch

    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _read_checkpoint(path: Path, facts: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Read the state of a training, and refuse that of another one; `None` where there is no file."""
    import safetensors
    import torch

    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_HEADER_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}
        if not isinstance(stored, dict):
            raise ValueError("its header is no dictionary")
        if stored.pop(_DIGEST, None) != _digest(state):
            raise ValueError("its checksum does not agree with its content")
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as err:
        raise CheckpointError(
            f"{path} is no checkpoint of a training, or damaged ({err}). {_ADVICE}"
        ) from err
    expected = json.loads(json.dumps(facts))
    for name in expected.keys() | stored.keys():
        if stored.get(name) != expected.get(name):
            difference = f"{stored.get(name)}, and not {expected.get(name)}"
            raise CheckpointError(f"{path} belongs to a training with {name} = {difference}. {_ADVICE}")
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} is of a training that diverged: {name} is not finite. {_ADVICE}")
    return state


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that there is the old one or the new one, and never a part.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file.
    data : `bytes`
        Its content.

    Raises
    ------
    OSError
        Raised if it cannot be written; it names the file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as err:
        Path(name).unlink(missing_ok=True)
        if isinstance(err, OSError) and err.errno is not None:
            err.filename = str(path)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
