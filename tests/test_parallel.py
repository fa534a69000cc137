# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

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
give_freed_memory_back()
print(kept - before, resident() - before, last.sum())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs glibc",
)
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """Nine images of 32 MiB, of which one is left."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, left, _ = (float(word) for word in done.stdout.split())
    assert kept > 8.5 * 2**25
    assert left < 1.5 * 2**25
