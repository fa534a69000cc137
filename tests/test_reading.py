# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Reading ahead: order, threads, how much is in memory, and errors."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from lsst.coadd.deepprior.reading import StoredSequence, in_turn, read_ahead


class Item:
    def __init__(self, index: int) -> None:
        self.index = index
        self.thread = threading.current_thread()


class Store(StoredSequence[Item]):
    def __init__(self, length: int) -> None:
        self._length = length
        self._alive: weakref.WeakSet[Item] = weakref.WeakSet()
        self.read: list[int] = []
        self.most_alive = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        if index == 99:
            raise OSError("no such item")
        item = Item(index)
        self._alive.add(item)
        self.most_alive = max(self.most_alive, len(self._alive))
        self.read.append(index)
        return item


def test_each_is_read_once_in_order_by_another_thread() -> None:
    store = Store(9)
    order = [3, 0, 8, 7, 1]
    seen = []
    for index, item in in_turn(store, order):
        assert item.index == index
        assert item.thread is not threading.current_thread()
        seen.append(index)
        del item
    assert seen == order == store.read
    gc.collect()
    assert store.most_alive <= 2


def test_what_is_in_memory_needs_no_thread() -> None:
    items = [Item(k) for k in range(3)]
    assert [item for _, item in in_turn(items, [2, 0])] == [items[2], items[0]]
    assert list(read_ahead(items, [])) == []


@pytest.mark.parametrize("order", [[99], [1, 99, 2]])
def test_an_error_comes_where_its_item_would(order: list[int]) -> None:
    items = read_ahead(Store(4), order)
    for index in order[: order.index(99)]:
        assert next(items)[0] == index
    with pytest.raises(OSError, match="no such item"):
        next(items)


def test_a_loop_that_ends_early_leaves_no_thread() -> None:
    def stop(store: Store) -> int:
        for index, _ in read_ahead(store, range(4)):
            return index
        return -1

    use: Callable[[Store], int] = stop
    before = threading.active_count()
    assert use(Store(4)) == 0
    gc.collect()
    assert threading.active_count() == before
