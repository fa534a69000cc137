# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Which device a quantum computes on, where others may be at work on the same machine."""

from __future__ import annotations

__all__ = ("Gpu", "choose_device", "visible_gpus")

import dataclasses
import os
from collections.abc import Callable, Sequence

_SAME = 0.02
"""Difference in free memory, as a part of all, below which GPUs count as used equally."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use.

    Parameters
    ----------
    name : `str`
        What torch calls it, ``cuda:0`` for instance.
    free_bytes, total_bytes : `int`
        Its memory.
    """

    name: str
    free_bytes: int
    total_bytes: int


def visible_gpus(notify: Callable[[str], None]) -> list[Gpu]:
    """Return the GPUs that torch finds; those that do not answer are left out.

    Batch systems say which GPUs a slot has in ``CUDA_VISIBLE_DEVICES``; others are not seen here.

    Parameters
    ----------
    notify : `~collections.abc.Callable`
        Called with a sentence for each GPU that does not answer, and where the slot has GPUs but torch finds
        none.
    """
    import torch

    gpus = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as err:
            notify(f"GPU {index} does not answer and is left out: {str(err).splitlines()[0]}")
            continue
        gpus.append(Gpu(f"cuda:{index}", free, total))
    granted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus and granted not in ("", "-1", "NoDevFiles"):
        notify(f"CUDA_VISIBLE_DEVICES is {granted}, but no GPU can be used here")
    return gpus


def choose_device(asked: str, gpus: Sequence[Gpu], number: int) -> str:
    """Choose where to compute.

    Of several GPUs it is the least used, the one with the largest part of its memory free. Quanta that start
    together find the same, so those that are used equally are told apart by a number.

    Parameters
    ----------
    asked : `str`
        ``auto``, ``cpu`` or ``cuda``.
    gpus : `~collections.abc.Sequence` [`Gpu`]
        The GPUs that can be used.
    number : `int`
        Number of the process.

    Returns
    -------
    device : `str`
        ``cpu``, or the name of a GPU.

    Raises
    ------
    RuntimeError
        Raised if a GPU is asked for and there is none.
    """
    if asked == "cuda" and not gpus:
        raise RuntimeError(
            "The configuration asks for device 'cuda', but torch finds no GPU here; ask the batch system for "
            "one, or set device to 'auto' or 'cpu'."
        )
    if asked == "cpu" or not gpus:
        return "cpu"
    most = max(gpu.free_bytes / gpu.total_bytes for gpu in gpus)
    least_used = [gpu for gpu in gpus if gpu.free_bytes / gpu.total_bytes >= most - _SAME]
    return least_used[number % len(least_used)].name
