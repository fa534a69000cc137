# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Observations on disk as they are in memory, for passes over more visits than memory holds."""

from __future__ import annotations

__all__ = ("ObservationFile",)

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .observation import Observation


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the file an array begins, and how it is to be read."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class ObservationFile:
    """Observations in a file without a name, whose room is free again when the process has ended, however.

    Parameters
    ----------
    directory : `~pathlib.Path`
        Where it shall be; on a disk of the node, since all of it is read in every pass.

    Raises
    ------
    OSError
        Raised if no file can be made there.
    """

    def __init__(self, directory: Path) -> None:
        # Without a buffer, whose rest of a failed write would fail once more when something is read.
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        self._end = 0
        self._entries: list[dict[str, Any]] = []

    def append(self, observation: Observation) -> int:
        """Write an observation.

        Parameters
        ----------
        observation : `~lsst.coadd.deepprior.observation.Observation`
            The observation.

        Returns
        -------
        number : `int`
            The number to ask for it by.

        Raises
        ------
        OSError
            Raised if there is no room; those before it can still be read.
        """
        entry: dict[str, Any] = {}
        end = self._end
        for field in dataclasses.fields(observation):
            value = getattr(observation, field.name)
            if isinstance(value, np.ndarray):
                self._file.seek(end)
                left = _octets(np.ascontiguousarray(value))
                while len(left):
                    left = left[self._file.write(left) :]
                value = _Place(end, value.shape, value.dtype)
                end = self._file.tell()
            entry[field.name] = value
        self._end = end
        self._entries.append(entry)
        return len(self._entries) - 1

    def __getitem__(self, number: int) -> Observation:
        """Read an observation.

        Raises
        ------
        OSError
            Raised if the file is shorter than it was.
        """
        values: dict[str, Any] = {
            name: self._read(value) if isinstance(value, _Place) else value
            for name, value in self._entries[number].items()
        }
        return Observation(**values)

    def _read(self, place: _Place) -> np.ndarray:
        array = np.empty(place.shape, place.dtype)
        self._file.seek(place.offset)
        left = _octets(array)
        while len(left):
            if not (n_read := self._file.readinto(left)):
                raise OSError("The file of observations is shorter than what was written to it.")
            left = left[n_read:]
        return array


def _octets(array: np.ndarray) -> memoryview:
    """Return the memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
