# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Observations come back from disk as they were."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import numpy as np
import pytest

from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.observation_file import ObservationFile
from lsst.coadd.deepprior.warp_streams import WarpObservations


def observation(shape: tuple[int, int], seed: int, *, with_noise: bool) -> Observation:
    rng = np.random.default_rng(seed)
    # A part of an image, as cut-outs of warps are, whose rows do not follow each other in memory.
    flux = rng.normal(size=(shape[0], shape[1] + 7)).astype(np.float32)[:, 3:-4]
    good = rng.random(shape) < 0.8
    flux[~good] = np.nan
    psf = rng.random((2, 3, 5, 5))
    psf[1, 2] = np.nan
    return Observation(
        flux=flux,
        variance=rng.random(shape).astype(np.float32) + 0.5,
        good=good,
        psf=psf,
        origin=(4, 9),
        name=f"visit {seed}",
        noise=rng.normal(size=shape).astype(np.float32) if with_noise else None,
        sampling=2,
    )


def test_observations_come_back(tmp_path: Path) -> None:
    originals = [observation((30, 41), 1, with_noise=False), observation((23, 17), 2, with_noise=True)]
    file = ObservationFile(tmp_path)
    numbers = [file.append(original) for original in originals]
    for number, original in reversed(list(zip(numbers, originals, strict=True))):
        read = file[number]
        for field in dataclasses.fields(Observation):
            expected, value = getattr(original, field.name), getattr(read, field.name)
            assert type(value) is type(expected)
            if isinstance(expected, np.ndarray):
                assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)
    assert list(tmp_path.iterdir()) == []


def test_what_is_released_is_read_again() -> None:
    originals = [observation((30, 41), seed, with_noise=False) for seed in (1, 2)]

    class CountedWarp:
        n_read = 0

        def observation(self, bad_planes: list[str]) -> Observation:
            self.n_read += 1
            return originals[1]

    warps = [CountedWarp(), CountedWarp()]
    observations = WarpObservations(warps, ["BAD"], cache_bytes=1e6)  # type: ignore[arg-type]
    observations.add(1, originals[1])
    assert observations[0] is originals[1]
    assert warps[1].n_read == 0
    observations.release()
    assert observations[0] is originals[1]
    assert [warp.n_read for warp in warps] == [0, 1]


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    file = ObservationFile(tmp_path)
    number = file.append(observation((30, 41), 1, with_noise=False))
    file._file.truncate(1000)
    with pytest.raises(OSError, match="shorter than what was written"):
        file[number]


@pytest.mark.parametrize("short_by", [1, 700, 500_000])
def test_what_was_written_before_a_disk_is_full_can_be_read(tmp_path: Path, short_by: int) -> None:
    """Wherever in the second observation the room ends: in its small arrays or in its large ones."""
    original = observation((300, 410), 1, with_noise=False)
    file = ObservationFile(tmp_path)
    number = file.append(original)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * file._end - short_by, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.append(original)
        np.testing.assert_array_equal(file[number].flux, original.flux)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = file.append(original)
    np.testing.assert_array_equal(file[again].psf, original.psf)
