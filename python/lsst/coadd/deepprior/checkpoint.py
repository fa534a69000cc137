# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""States of a computation on disk, from which it can go on."""

from __future__ import annotations

__all__ = (
    "CheckpointError",
    "DamagedCheckpointError",
    "read_checkpoint",
    "write_atomically",
    "write_checkpoint",
)

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HEADER_KEY = "deepprior"
"""The entry of the safetensors metadata of a checkpoint that says what it belongs to."""

_DIGEST = "sha256"
"""The entry of this header with the checksum of the tensors."""


class CheckpointError(RuntimeError):
    """Raised for a checkpoint that cannot be continued; the message says why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """Raised for a file that is no checkpoint, or one that is damaged or of a computation that diverged."""


def write_checkpoint(path: Path, state: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write a state, with what it belongs to, as safetensors.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file; there is the old or the new one at any time.
    state : `dict` [`str`, `torch.Tensor`]
        Tensors of any device.
    facts : `dict`
        What the state belongs to, as far as JSON can say it.

    Raises
    ------
    OSError
        Raised if the file cannot be written; it names the file.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = json.dumps(facts | {_DIGEST: _digest(tensors)})
    write_atomically(path, safetensors.torch.save(tensors, {_HEADER_KEY: header}))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of names, types, shapes and values."""
    import safetensors.torch

    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def read_checkpoint(
    path: Path, facts: dict[str, Any], *, owner: str, advice: str, are_all_facts: bool = True
) -> dict[str, torch.Tensor] | None:
    """Read a state, and refuse one that belongs to something else.

    Parameters
    ----------
    path : `~pathlib.Path`
        The file.
    facts : `dict`
        What the state must belong to.
    owner : `str`
        What messages call the computation, ``a training`` for instance.
    advice : `str`
        Last sentence of the messages: what to do.
    are_all_facts : `bool`, optional
        Whether the state must belong to nothing else.

    Returns
    -------
    state : `dict` [`str`, `torch.Tensor`] or `None`
        The state on the CPU; `None` where there is no file.

    Raises
    ------
    DamagedCheckpointError
        Raised if the file is no checkpoint, does not agree with its checksum, or holds numbers that are not
        finite.
    CheckpointError
        Raised if the state belongs to something else.
    """
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
        raise DamagedCheckpointError(
            f"{path} is no checkpoint of {owner}, or damaged ({err}). {advice}"
        ) from err
    expected = json.loads(json.dumps(facts))
    for name in sorted(expected.keys() | stored.keys() if are_all_facts else expected):
        if stored.get(name) != expected.get(name):
            difference = "{}, and not {}".format(*_unlike(stored.get(name), expected.get(name)))
            raise CheckpointError(f"{path} belongs to {owner} with {name} = {difference}. {advice}")
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpointError(
                f"{path} is of {owner} that diverged: {name} is not finite. {advice}"
            )
    return state


def _unlike(one: Any, other: Any) -> tuple[Any, Any]:
    """Return what differs between two facts: of dictionaries the entries."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    missing = object()
    names = [name for name in one | other if one.get(name, missing) != other.get(name, missing)]
    first, second = ({name: fact[name] for name in names if name in fact} for fact in (one, other))
    return first, second


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
