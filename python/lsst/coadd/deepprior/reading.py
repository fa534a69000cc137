# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Reading of the next item while something is done with the last one."""

from __future__ import annotations

__all__ = ("StoredSequence", "in_turn", "read_ahead")

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class _Source[T](Protocol):
    """What has items by index."""

    def __getitem__(self, index: int, /) -> T: ...


class StoredSequence[T](Sequence[T]):
    """Items that are read from a store when they are asked for, by whatever thread asks."""


def read_ahead[T](items: _Source[T], indices: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Iterate over some items, each read in a thread of its own while the one before it is at work.

    Parameters
    ----------
    items : `~collections.abc.Sequence`
        The items; two at most are in memory.
    indices : `~collections.abc.Sequence` [`int`]
        Which of them, in this order.

    Yields
    ------
    index : `int`
        Index of the item.
    item : `object`
        The item.
    """
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        coming = reader.submit(items.__getitem__, indices[0]) if indices else None
        for place, index in enumerate(indices):
            assert coming is not None
            item = coming.result()
            coming = None
            if place + 1 < len(indices):
                coming = reader.submit(items.__getitem__, indices[place + 1])
            yield index, item
            del item


def in_turn[T](items: Sequence[T], indices: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Iterate over some items, with `read_ahead` where they are read from a store."""
    if isinstance(items, StoredSequence):
        yield from read_ahead(items, indices)
    else:
        for index in indices:
            yield index, items[index]
