# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps of a Butler, and their observations, of which no more is in memory than there is room for."""

from __future__ import annotations

__all__ = ("WarpHandles", "WarpObservations", "cell_layout", "default_cache_bytes")

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from lsst.daf.butler import DeferredDatasetHandle
from lsst.images.cells import CellGrid
from lsst.pipe.base import InMemoryDatasetHandle

from .observation import Observation
from .observation_file import ObservationFile
from .warps import Warp

if TYPE_CHECKING:
    from .operators import CellLayout


def _read_cell_coadd(handle: DeferredDatasetHandle | InMemoryDatasetHandle) -> Warp:
    return Warp.from_cell_coadd(handle.get())


_LARGEST_CACHE = 1.5 * 2**30
"""Largest cache in bytes unless one is asked for: with it a Rubin patch takes less than 10 GB, whatever the
number of its visits."""

_LOG = logging.getLogger(__name__)


class WarpHandles(Sequence[Warp]):
    """Warps that are read each time they are asked for, so that one is in memory at a time.

    Parameters
    ----------
    handles : `~collections.abc.Iterable`
        Deferred handles of the warps. They are put in the order of instrument and visit, so that the result
        does not depend on the order in which they come.
    read : `~collections.abc.Callable`, optional
        Function that reads the warp of a handle; without it, handles are those of one-visit cell coadds.
    """

    def __init__(
        self,
        handles: Iterable[DeferredDatasetHandle | InMemoryDatasetHandle],
        read: Callable[[DeferredDatasetHandle | InMemoryDatasetHandle], Warp] = _read_cell_coadd,
    ) -> None:
        self._read = read
        self._handles = sorted(
            handles, key=lambda handle: (handle.dataId["instrument"], handle.dataId["visit"])
        )

    def __len__(self) -> int:
        return len(self._handles)

    @overload
    def __getitem__(self, index: int) -> Warp: ...

    @overload
    def __getitem__(self, index: slice) -> WarpHandles: ...

    def __getitem__(self, index: int | slice) -> Warp | WarpHandles:
        """Read a warp.

        Raises
        ------
        RuntimeError
            Raised if the warp cannot be read or is not valid; the message names its data ID.
        """
        if isinstance(index, slice):
            return WarpHandles(self._handles[index], self._read)
        handle = self._handles[index]
        try:
            return self._read(handle)
        except Exception as err:
            raise RuntimeError(f"The warp {handle.dataId} cannot be used: {err}") from err


class WarpObservations(Sequence[Observation]):
    """Observations of some warps, of which a limited number of bytes is kept in memory.

    Parameters
    ----------
    warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.Warp`]
        The warps.
    bad_planes : `~collections.abc.Sequence` [`str`]
        Mask planes that make a pixel unusable.
    cache_bytes : `float`
        How much is kept.
    cache_dir : `~pathlib.Path`, optional
        Directory on a disk that keeps the others. Without it, and where the disk has no room, their warps are
        read again each time.

    Raises
    ------
    RuntimeError
        Raised if no file can be made in ``cache_dir``.
    """

    def __init__(
        self,
        warps: Sequence[Warp],
        bad_planes: Sequence[str],
        cache_bytes: float,
        cache_dir: Path | None = None,
    ) -> None:
        self._warps = warps
        self._bad_planes = bad_planes
        self._room = cache_bytes
        self._indices: list[int] = []
        self._kept: dict[int, Observation] = {}
        self._on_disk: dict[int, int] = {}
        self._disk_has_room = cache_dir is not None
        if cache_dir is not None:
            try:
                self._file = ObservationFile(cache_dir)
            except OSError as err:
                raise RuntimeError(f"cache_dir = {str(cache_dir)!r} cannot be used: {err}.") from err

    def add(self, index: int, observation: Observation) -> None:
        """Append the observation of a warp.

        Parameters
        ----------
        index : `int`
            Index of the warp in ``warps``.
        observation : `~lsst.coadd.deepprior.observation.Observation`
            Its observation.
        """
        self._indices.append(index)
        arrays = [observation.flux, observation.variance, observation.good, observation.psf]
        if observation.noise is not None:
            arrays.append(observation.noise)
        size = sum(array.nbytes for array in arrays)
        if size <= self._room:
            self._room -= size
            self._kept[index] = observation
        elif self._disk_has_room:
            try:
                self._on_disk[index] = self._file.append(observation)
            except OSError as err:
                self._disk_has_room = False
                _LOG.warning("cache_dir is full, and further warps will be read in every pass: %s", err)

    def release(self) -> None:
        """Give up what is in memory; what is asked for afterwards comes from a disk or is read again."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Observation:  # type: ignore[override]
        index = self._indices[position]
        if index in self._kept:
            return self._kept[index]
        if index in self._on_disk:
            return self._file[self._on_disk[index]]
        return self._warps[index].observation(self._bad_planes)


def cell_layout(cells: CellGrid) -> CellLayout:
    """Return the cells of a patch as the numerics see them.

    Parameters
    ----------
    cells : `lsst.images.cells.CellGrid`
        Cells of a patch.

    Returns
    -------
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Their number and size.
    """
    from .operators import CellLayout

    return CellLayout(cells.grid_size.i, cells.grid_size.j, cells.cell_shape.y, cells.cell_shape.x)


def default_cache_bytes(memory_bytes: float | None = None) -> float:
    """Return how much of the pixels of warps is kept unless the configuration says it.

    Parameters
    ----------
    memory_bytes : `float`, optional
        Memory that may be taken; by default that of the machine.

    Returns
    -------
    cache_bytes : `float`
        A quarter of the memory, at most 1.5 GiB.
    """
    if memory_bytes is None:
        memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(0.25 * memory_bytes, _LARGEST_CACHE)
