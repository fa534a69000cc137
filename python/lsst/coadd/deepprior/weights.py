# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Trained networks: weights with the ranges they were trained on, as safetensors."""

from __future__ import annotations

__all__ = ("InvalidNetworkError", "TrainedNetwork", "packaged_network")

import dataclasses
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from .network import FEATURES, Trunk

_FORMAT = "lsst.coadd.deepprior.network"
"""What the header of a file says it is."""

_FORMAT_VERSION = 1
"""Raised whenever files of the version before cannot be used any more."""

_HEADER_KEY = "deepprior"
"""The one entry of the safetensors metadata; several have no fixed order, and so no fixed bytes."""

_PACKAGED = "networks/default.safetensors"

_TOLERANCE = 0.02
"""Distance out of a range that is still called inside, relative where a limit is above 1.

A target PSF that is given in arcsec has not quite the same size in pixels in all patches, and fractions are
measured with noise.
"""


class InvalidNetworkError(ValueError):
    """Raised for data that are not a network that this version can use; the message is one sentence."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A trained network, and what it was trained on.

    Parameters
    ----------
    trunk : `~lsst.coadd.deepprior.network.Trunk`
        The network.
    ranges : `dict` [`str`, `tuple` [`float`, `float`]]
        Smallest and largest trained value of each axis, such as the number of visits.
    card : `dict` [`str`, `str`]
        How the network was made: ``name``, ``command``, and whatever else a user should know.

    Raises
    ------
    InvalidNetworkError
        Raised if the ranges or the card are not of this form, or the network reads other features.
    """

    trunk: Trunk
    ranges: dict[str, tuple[float, float]]
    card: dict[str, str]

    def __post_init__(self) -> None:
        for axis, limits in self.ranges.items():
            if not (len(limits) == 2 and all(map(math.isfinite, limits)) and limits[0] <= limits[1]):
                raise InvalidNetworkError(f"The trained range of {axis}, {limits}, is no interval.")
        if not all(isinstance(text, str) for item in self.card.items() for text in item):
            raise InvalidNetworkError("The card of a network must hold nothing but text.")
        if (n_channels := self.trunk.entry.in_channels) != 4 * len(FEATURES):
            raise InvalidNetworkError(
                f"The network reads {n_channels // 4} features, but there are {len(FEATURES)}."
            )

    @property
    def name(self) -> str:
        """What the card calls the network (`str`)."""
        return self.card.get("name", "unnamed")

    @property
    def version(self) -> str:
        """Version of the software that trained it, by the card (`str`)."""
        return self.card.get("deepprior_version", "unknown")

    @property
    def sha256(self) -> str:
        """SHA-256 of header and weights, the identity of the network (`str`)."""
        return _digest(self._header(), _float32(self.trunk))

    def outside(self, values: Mapping[str, float]) -> list[str]:
        """Say on which axes a patch lies outside of what the network was trained on.

        Parameters
        ----------
        values : `~collections.abc.Mapping` [`str`, `float`]
            Values of a patch by axis.

        Returns
        -------
        messages : `list` [`str`]
            One message for each axis on which the value is not within the trained range, give or take 2 % (or
            0.02 where the limit is below 1), or only one of the two is known.
        """
        messages = []
        for axis in self.ranges | dict(values):
            if axis not in values:
                messages.append(f"{axis} is not known")
            elif axis not in self.ranges:
                messages.append(f"{axis} = {values[axis]:.4g}, for which no trained range is known")
            else:
                low, high = self.ranges[axis]
                if not low - _slack(low) <= values[axis] <= high + _slack(high):
                    messages.append(f"{axis} = {values[axis]:.4g}, trained from {low:.4g} to {high:.4g}")
        return messages

    def to_bytes(self) -> bytes:
        """Write the network.

        Returns
        -------
        data : `bytes`
            Content of a safetensors file. It depends on nothing but the network.

        Raises
        ------
        InvalidNetworkError
            Raised if a weight is not finite.
        """
        tensors = _float32(self.trunk)
        _check_finite(tensors)
        header = self._header()
        text = json.dumps(header | {"sha256": _digest(header, tensors)}, sort_keys=True)
        return safetensors.torch.save(tensors, {_HEADER_KEY: text})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainedNetwork:
        """Read a network and check all of it.

        Parameters
        ----------
        data : `bytes`
            Content of a safetensors file.

        Returns
        -------
        network : `TrainedNetwork`
            The network, on the CPU, in float32, without gradients.

        Raises
        ------
        InvalidNetworkError
            Raised if the data are truncated, damaged, of another origin, of another version of the format, or
            made for other features.
        """
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, KeyError) as err:
            raise InvalidNetworkError(
                f"These are not the data of a network, or they are damaged ({err})."
            ) from err
        header = _read_header(data)
        digest = header.pop("sha256", None)
        try:
            trunk = _empty_trunk(header["widths"])
            ranges = {axis: (float(low), float(high)) for axis, (low, high) in header["ranges"].items()}
            card = dict(header["card"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as err:
            raise InvalidNetworkError(f"The header of the network is damaged ({err!r}).") from err
        _check_tensors(tensors, trunk.state_dict())
        if digest != _digest(header, tensors):
            raise InvalidNetworkError("The network is damaged: its checksum does not agree with its content.")
        trunk.load_state_dict(tensors, assign=True)
        return cls(trunk=trunk.requires_grad_(False), ranges=ranges, card=card)

    def _header(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "features": list(FEATURES),
            "widths": _widths(self.trunk),
            "ranges": {axis: [float(low), float(high)] for axis, (low, high) in self.ranges.items()},
            "card": self.card,
        }


def packaged_network() -> TrainedNetwork:
    """Read the network that comes with the package.

    Returns
    -------
    network : `TrainedNetwork`
        The network.

    Raises
    ------
    InvalidNetworkError
        Raised if it is missing or damaged.
    """
    file = importlib.resources.files("lsst.coadd.deepprior.resources").joinpath(_PACKAGED)
    try:
        data = file.read_bytes()
    except OSError as err:
        raise InvalidNetworkError(
            f"The network that comes with the package cannot be read ({err}); install the package anew."
        ) from err
    return TrainedNetwork.from_bytes(data)


def _slack(limit: float) -> float:
    """Return how far beyond a limit of a range is still inside."""
    return _TOLERANCE * max(1.0, abs(limit))


def _widths(trunk: Trunk) -> list[int]:
    """Return the channels of a network at 1/2, 1/4, 1/8 ... of the resolution."""
    weights = trunk.encoders.state_dict()
    return [len(weight) for name, weight in weights.items() if name.endswith(".first.bias")]


def _float32(trunk: Trunk) -> dict[str, torch.Tensor]:
    """Return the weights in the form in which they are written."""
    return {
        name: tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        for name, tensor in trunk.state_dict().items()
    }


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of a header without digest, and of the weights."""
    result = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        result.update(name.encode())
        result.update(tensors[name].numpy().tobytes())
    return result.hexdigest()


def _read_header(data: bytes) -> dict[str, Any]:
    """Return our part of the metadata of safetensors that were read already.

    The library reads metadata from files only; the layout is that of its documentation: the length of the
    JSON header as 8 bytes, little end first, and the header.
    """
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    if _HEADER_KEY not in metadata:
        raise InvalidNetworkError("These are the weights of another software, not of a network of this one.")
    try:
        header = json.loads(metadata[_HEADER_KEY])
    except json.JSONDecodeError as err:
        raise InvalidNetworkError(f"The header of the network is damaged ({err}).") from err
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InvalidNetworkError("These are the weights of another software, not of a network of this one.")
    if header.get("version") != _FORMAT_VERSION:
        raise InvalidNetworkError(
            f"The network is of version {header.get('version')} of the format, and this software reads "
            f"version {_FORMAT_VERSION}; train it anew, or install the version of the software that made it."
        )
    if header.get("features") != list(FEATURES):
        raise InvalidNetworkError(
            f"The network was made for the features {header.get('features')}, and this software has "
            f"{list(FEATURES)}; train it anew, or install the version of the software that made it."
        )
    return header


def _empty_trunk(widths: list[int]) -> Trunk:
    """Make a network of given widths whose weights take no memory."""
    if not (
        isinstance(widths, list) and widths and all(type(width) is int and width > 0 for width in widths)
    ):
        raise ValueError(f"widths = {widths}")
    with torch.device("meta"):
        return Trunk(widths=tuple(widths))


def _check_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not those of a network."""
    if tensors.keys() != expected.keys():
        names = ", ".join(sorted(tensors.keys() ^ expected.keys()))
        raise InvalidNetworkError(f"The network lacks weights or has too many of them: {names}.")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise InvalidNetworkError(f"The weight {name} is of type {tensor.dtype}, not torch.float32.")
        if tensor.shape != expected[name].shape:
            raise InvalidNetworkError(
                f"The weight {name} has the shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}."
            )
    _check_finite(tensors)


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidNetworkError(f"The weight {name} is not finite.")
