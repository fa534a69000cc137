# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Parts of an image at once on the cores of a CPU.

Threads that share large pieces wait for each other a few times an image. Those of the single operations of
torch would wait thousands of times, each time for a core that others may have.
"""

from __future__ import annotations

__all__ = (
    "by_rows",
    "give_freed_memory_back",
    "in_parallel",
    "keep_freed_memory",
    "operations_in_parallel",
    "use_threads",
)

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""

_asked: list[int] = []
"""Number of threads of `use_threads`, if it was called."""

_BLOCK_PIXELS = 2**17
"""Number of pixels of a block of rows."""

_left_resident = 0
"""Bytes of memory that the process had after `give_freed_memory_back`."""


def in_parallel[T](function: Callable[[T], None], parts: Sequence[T], like: torch.Tensor) -> None:
    """Call a function for parts that do not depend on each other, on as many threads as torch has.

    The thread that calls takes parts like the others, so that small ones do not wait for another to wake up.

    Parameters
    ----------
    function : `~collections.abc.Callable`
        Function of a part. Without a need for gradients.
    parts : `~collections.abc.Sequence`
        The parts.
    like : `torch.Tensor`
        A tensor of the computation; elsewhere than on a CPU, or where it has a gradient, parts come one by
        one.
    """
    n_threads = _asked[-1] if _asked else torch.get_num_threads()
    n_used = min(n_threads, len(parts))
    if n_used <= 1 or like.device.type != "cpu" or like.requires_grad:
        for part in parts:
            function(part)
        return
    waiting = collections.deque(parts)

    def take() -> None:
        with torch.no_grad():
            while waiting:
                try:
                    part = waiting.popleft()
                except IndexError:
                    return
                function(part)

    helpers = [_threads(n_threads - 1, os.getpid()).submit(take) for _ in range(n_used - 1)]
    try:
        with _operations_on_one_thread():
            take()
    finally:
        waiting.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        concurrent.futures.wait(begun)
    for helper in begun:
        helper.result()


@contextlib.contextmanager
def _operations_on_one_thread() -> Iterator[None]:
    """Have torch's operations in this thread not divided further."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def use_threads(n_threads: int) -> None:
    """Give some threads to large pieces, and one to the single operations of torch.

    Parameters
    ----------
    n_threads : `int`
        Number of threads.
    """
    _asked[:] = [n_threads]
    torch.set_num_threads(1)


@contextlib.contextmanager
def operations_in_parallel() -> Iterator[None]:
    """Give the threads of `use_threads` to the single operations of torch instead, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(_asked[-1] if _asked else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_rows(function: Callable[..., object], *images: torch.Tensor) -> None:
    """Call a function for blocks of rows of images, of a size that a cache holds, which are not copied.

    Parameters
    ----------
    function : `~collections.abc.Callable`
        Function of the same rows of all images, which it may change.
    *images : `torch.Tensor`, (..., y, x)
        Images of one shape.
    """
    first = images[0]
    rows = max(1, _BLOCK_PIXELS // max(1, first[..., 0, :].numel()))
    if first.device.type != "cpu":
        rows = first.shape[-2]

    def block(start: int) -> None:
        n = min(rows, first.shape[-2] - start)
        function(*(image.narrow(-2, start, n) for image in images))

    in_parallel(block, range(0, first.shape[-2], rows), first)


@functools.lru_cache(maxsize=1)
def _threads(n_threads: int, process: int) -> concurrent.futures.ThreadPoolExecutor:
    """Return other threads, in which torch's operations are not divided further."""
    before = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(
        n_threads, "deepprior", initializer=torch.set_num_threads, initargs=(1,)
    )
    for future in [pool.submit(torch.get_num_threads) for _ in range(4 * n_threads)]:
        future.result()
    # The last call counts for threads that begin later.
    torch.set_num_threads(before)
    return pool


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for what is allocated next, where there is glibc.

    Otherwise each image of a patch larger than 32 MiB is given back to the system when it is freed, and the
    next one comes from it page by page, which takes longer than most operations on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back(beyond: float = 0.0) -> None:
    """Have glibc give back to the system what it has kept of freed memory, where there is glibc.

    Between two phases of a restoration, so that what one has left in pieces is not added to what the next one
    needs; and within a long phase now and then, since whatever small thing is kept in the place of a freed
    image has the next image come from the system.

    Parameters
    ----------
    beyond : `float`, optional
        Bytes by which the process must have grown since it was done last, otherwise nothing is done: to get
        memory from the system again takes time.
    """
    global _left_resident
    if beyond > 0.0 and _resident() < _left_resident + beyond:
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
    _left_resident = _resident()


def _resident() -> int:
    """Return the bytes of memory that the process has, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
