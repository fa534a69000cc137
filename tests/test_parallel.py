# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from lsst.coadd.deepprior import parallel
from lsst.coadd.deepprior.parallel import in_parallel

SCRIPT = """
import numpy as np
from lsst.coadd.deepprior.parallel import give_freed_memory_back, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])

keep_freed_memory()
before = resident()
images = [np.ones(2**22) for _ in range(8)]
last = np.ones(2**22)  # lies behind the others
del images
kept = resident()
give_freed_memory_back(beyond=2**40)
print(kept - before, resident() - before, end=" ")
give_freed_memory_back()
print(resident() - before, last.sum(), end=" ")
images = [np.ones(2**22) for _ in range(8)]
del images
give_freed_memory_back(beyond=2**27)
print(resident() - before)
"""

PASS = """
import numpy as np
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.parallel import keep_freed_memory
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.psf import gaussian_stamp

keep_freed_memory()
shape = (80, 60)
layout = CellLayout(4, 3, 20, 20)
stamp = np.broadcast_to(gaussian_stamp(1.7, 21), (4, 3, 21, 21))
ones = np.ones(shape, dtype=np.float32)
data = PatchData([Observation(ones, ones, ones > 0, stamp, (0, 0), "visit")] * 3, layout, 0.8)
for index, _ in data.visits():
    with open("/proc/self/statm") as file:
        print(4096 * int(file.read().split()[1]), end=" ")
    if index == 1:
        images = [np.ones(2**22) for _ in range(16)]
        last = np.ones(2**22)  # lies behind the others
        del images
"""


needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs glibc",
)


@needs_glibc
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """Nine images of 32 MiB, of which one is left."""
    kept, still, left, _, again = _printed(SCRIPT)
    assert kept > 8.5 * 2**25
    assert still > 8.5 * 2**25
    assert left < 1.5 * 2**25
    assert again < 1.5 * 2**25


@needs_glibc
def test_memory_that_work_on_a_visit_has_freed_is_given_back() -> None:
    """17 images of 32 MiB in the second of three visits, of which one is left."""
    first, second, third = _printed(PASS)
    assert second - first < 2**24
    assert third - second < 1.5 * 2**25


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel, "_asked", [])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_the_thread_that_calls_works_with_the_others() -> None:
    """Nobody passes the barrier before three are at it."""
    barrier, done = threading.Barrier(3, timeout=60.0), []

    def work(part: int) -> None:
        barrier.wait()
        done.append((part, threading.get_ident(), torch.get_num_threads()))

    in_parallel(work, range(9), torch.zeros(1))
    parts, threads, operations = zip(*done, strict=True)
    assert sorted(parts) == list(range(9))
    assert len(set(threads)) == 3
    assert threading.get_ident() in threads
    assert set(operations) == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_are_made_once_whatever_the_number_of_parts() -> None:
    parallel._threads.cache_clear()
    for n_parts in (2, 9, 3, 2):
        in_parallel(lambda part: None, range(n_parts), torch.zeros(1))
    assert parallel._threads.cache_info().misses == 1


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_errors_of_a_part_are_raised_whoever_has_it(error: type[Exception]) -> None:
    for here in (True, False):
        barrier = threading.Barrier(3, timeout=60.0)

        def work(part: int, here: bool = here, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if here == (threading.current_thread() is threading.main_thread()):
                raise error("of a part")

        with pytest.raises(error, match="of a part"):
            in_parallel(work, range(3), torch.zeros(1))
        assert torch.get_num_threads() == 3


def _printed(script: str) -> list[float]:
    """Return the numbers that a script prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]
