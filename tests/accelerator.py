# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""An accelerator that is not there: finds tensors on the wrong device on any machine."""

from __future__ import annotations

__all__ = ("ACCELERATOR", "PretendedAccelerator", "WrongDeviceError")

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ACCELERATOR = torch.device("meta")
"""What the accelerator is called; nothing here uses the device of this name otherwise."""

_TAKE_INDICES = ("__getitem__", "__setitem__")
"""Functions that take tensors of the host as indices."""


class WrongDeviceError(RuntimeError):
    """Raised where tensors of the host and of the accelerator are used together."""


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    """Find all tensors in nested sequences and mappings."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)


def _is_device(item: Any) -> bool:
    return isinstance(item, torch.device) or (isinstance(item, str) and item in ("cpu", ACCELERATOR.type))


def _is_there(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_on_accelerator", False)


def _put(result: Any, there: bool) -> Any:
    for tensor in _tensors(result):
        tensor._on_accelerator = there  # type: ignore[attr-defined]
    return result


class PretendedAccelerator(TorchFunctionMode):
    """Compute on the CPU what is asked of `ACCELERATOR`, and remember which tensors it would hold.

    As on a real accelerator, tensors of no dimension may be mixed with others, the host may hold indices, and
    results must be copied back before numpy reads them.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = list(_tensors(args)) + list(_tensors(kwargs))
        there = any(_is_there(tensor) for tensor in given)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return ACCELERATOR if there else torch.device("cpu")
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            _put(args[0], _is_there(args[1]))
            return func(*args, **kwargs)
        if name in ("_parse_to", "_has_compatible_shallow_copy_type", "copy_") or func is torch.device:
            # They compute nothing, or copy from one device to the other.
            return func(*args, **kwargs)
        asked = [arg for arg in (*args, kwargs.get("device")) if _is_device(arg)]
        if name in ("to", "cpu", "as_tensor", "tensor") or (asked and not given):
            return self._moved(func, name, given, asked, args, kwargs)
        if there and name in ("numpy", "__array__"):
            raise WrongDeviceError("numpy cannot read a tensor of the accelerator.")
        here = [tensor for tensor in given if not _is_there(tensor) and tensor.dim() > 0]
        if there and here and not (name in _TAKE_INDICES and _is_there(given[0])):
            raise WrongDeviceError(f"{name} was given tensors of the accelerator and of the host.")
        if asked:
            there = asked[-1] == ACCELERATOR
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return _put(result, there) if there else result

    def _moved(
        self, func: Callable, name: str, given: list, asked: list, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Make a tensor, or move one: always a copy, so that the original stays where it is."""
        there = (
            torch.device(asked[-1]) == ACCELERATOR if asked else any(_is_there(tensor) for tensor in given)
        )
        if name == "cpu":
            there = False
        if asked:
            args = tuple(torch.device("cpu") if _is_device(arg) else arg for arg in args)
            if "device" in kwargs:
                kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if given and result is given[0] and there != _is_there(given[0]):
            result = result.clone()
        return _put(result, there)
