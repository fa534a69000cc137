# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What restorations cost: time, memory and storage, from measured constants.

The constants are in ``config/costs`` of the package, one file a device, as ``benchmarks/costs.py`` measures
them. All costs are taken to be linear in the number of pixels and in that of pixels times visits.
"""

from __future__ import annotations

__all__ = (
    "CACHE_BYTES",
    "CANVAS_MARGIN",
    "STARTS",
    "Costs",
    "Estimate",
    "estimate",
    "job_requests",
)

import dataclasses
import importlib.resources
import json
import math
from pathlib import Path

CANVAS_MARGIN = 16
"""Width in pixels of the canvas around a patch, as in `lsst.coadd.deepprior.fitted_patch`."""

STARTS = ("pretrained", "scratch")
"""Values of the config field ``init``."""

CACHE_BYTES = 9
"""Memory that the cache takes for a pixel of a warp: flux, variance, and whether it is good."""

DEFAULT_CACHE_GIB = 1.5
"""Largest memory that the cache takes unless the config field ``cache_gib`` says more."""

FITTED_WHOLE = 1024
"""Largest side in pixels of patches that the fit from scratch sees whole, as in
`lsst.coadd.deepprior.windows`."""

FIT_SIDE = 600
"""Side in pixels of each of the four windows of larger patches if their cells have 150 pixels, Rubin's."""

_SPARE_MEMORY = 2.0
"""What is asked for over what is estimated; batch systems kill what takes more than it asked for, and crowded
or deep patches have more sources to measure than those that the estimate comes of."""

_SPARE_TIME = 2.0
"""The same for time, since other processors are slower than that of the measurement."""

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured constants of one start on one device; pixels are those of the canvas or of the patch.

    Parameters
    ----------
    seconds_start, seconds_per_pixel, seconds_per_pixel_and_visit : `float`
        Time of the restoration without a fit: fixed, and by pixels of the canvas.
    seconds_fit_per_pixel, seconds_fit_per_pixel_and_visit, memory_fit_bytes_per_pixel : `float`
        What a fit from scratch takes more, by those of the pixels that it sees.
    largest_relative_deviation : `float`
        Of the time of a measured patch from what these give.
    seconds_after, seconds_after_per_pixel : `float`
        Time of measurement and figure: fixed, and by pixels of the patch.
    seconds_read_per_pixel_and_visit : `float`
        Time to read a warp, by its pixels.
    disk_share : `float`
        Time to read the pixels of a warp from ``cache_dir`` over that of reading the warp.
    passes : `float`
        How often the restoration asks for each warp; those in its cache are not read again.
    memory_bytes, memory_bytes_per_pixel : `float`
        Largest memory of the restoration without the cache of warps: fixed, and by pixels of the canvas.
    memory_after_bytes, memory_after_bytes_per_pixel : `float`
        Largest memory of measurement and figure.
    output_bytes_per_pixel, warp_bytes_per_pixel : `float`
        Sizes of all outputs, and of one warp, by pixels of the patch.
    """

    seconds_start: float
    seconds_per_pixel: float
    seconds_per_pixel_and_visit: float
    seconds_fit_per_pixel: float
    seconds_fit_per_pixel_and_visit: float
    memory_fit_bytes_per_pixel: float
    largest_relative_deviation: float
    seconds_after: float
    seconds_after_per_pixel: float
    seconds_read_per_pixel_and_visit: float
    disk_share: float
    passes: float
    memory_bytes: float
    memory_bytes_per_pixel: float
    memory_after_bytes: float
    memory_after_bytes_per_pixel: float
    output_bytes_per_pixel: float
    warp_bytes_per_pixel: float

    @classmethod
    def read(cls, start: str, device: str = "cpu", path: Path | None = None) -> Costs:
        """Read the constants of a start.

        Parameters
        ----------
        start : `str`
            One of `STARTS`.
        device : `str`, optional
            Device whose constants are taken from the package.
        path : `~pathlib.Path`, optional
            File of ``benchmarks/costs.py`` to read instead.

        Raises
        ------
        ValueError
            Raised if the start is unknown, there are no constants for the device, or the file has none.
        OSError
            Raised if the file cannot be read.
        """
        if start not in STARTS:
            raise ValueError(f"The start {start!r} is none of {', '.join(STARTS)}.")
        folder = importlib.resources.files(__package__) / "resources/config/costs"
        file = path if path is not None else folder / f"{device}.json"
        try:
            return cls(**json.loads(file.read_text())["starts"][start])
        except FileNotFoundError:
            raise ValueError(
                f"There are no measured costs for {path or device}: measure them with 'python "
                f"benchmarks/costs.py --device {device}' on such a machine, and name the file with --costs."
            ) from None
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{file} is no file of benchmarks/costs.py: {err}.") from err


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one patch and band costs.

    Parameters
    ----------
    seconds : `float`
        Time of the restoration without reading, on one core of a CPU or on a GPU.
    seconds_read : `float`
        Time to read warps, those that do not fit in the cache again in every pass.
    seconds_after : `float`
        Time of measurement and figure on one core.
    memory_bytes, memory_after_bytes : `float`
        Largest memory of the restoration, and of measurement and figure.
    warp_bytes, output_bytes : `float`
        Storage of the warps and of the outputs.
    disk_bytes : `float`
        What ``cache_dir`` holds while a quantum runs.
    """

    seconds: float
    seconds_read: float
    seconds_after: float
    memory_bytes: float
    memory_after_bytes: float
    warp_bytes: float
    output_bytes: float
    disk_bytes: float


def estimate(
    patch_size: int,
    n_visits: int,
    costs: Costs,
    cache_gib: float = DEFAULT_CACHE_GIB,
    cache_on_disk: bool = False,
) -> Estimate:
    """Estimate what one patch and band costs.

    Parameters
    ----------
    patch_size : `int`
        Side of the patch in pixels.
    n_visits : `int`
        Number of visits.
    costs : `Costs`
        Measured constants.
    cache_gib : `float`, optional
        The config field of this name.
    cache_on_disk : `bool`, optional
        Whether the config field ``cache_dir`` names a directory.

    Returns
    -------
    result : `Estimate`
        The costs.

    Raises
    ------
    ValueError
        Raised if there is no pixel or no visit, or the cache has no size, or a negative one.
    """
    if patch_size < 1 or n_visits < 1 or not cache_gib >= 0.0:
        raise ValueError(
            f"A patch has at least one pixel and one visit, and a cache a size that is not negative; got "
            f"{patch_size} pixels, {n_visits} visits and {cache_gib} GiB."
        )
    inner, canvas = patch_size**2, (patch_size + 2 * CANVAS_MARGIN) ** 2
    pixels = inner * n_visits
    kept = min(CACHE_BYTES * pixels, cache_gib * 2**30)
    read_again = (costs.passes - 1.0) * (1.0 - kept / (CACHE_BYTES * pixels))
    if cache_on_disk:
        read_again *= costs.disk_share
    whole = patch_size <= FITTED_WHOLE
    fitted = canvas if whole else (FIT_SIDE + 2 * CANVAS_MARGIN) ** 2
    fit_bytes = costs.memory_fit_bytes_per_pixel * fitted
    if fit_bytes and not whole:
        # The pixels of the windows are kept beside those of the cache.
        fit_bytes += CACHE_BYTES * 4 * FIT_SIDE**2 * n_visits
    return Estimate(
        seconds=costs.seconds_start
        + canvas * (costs.seconds_per_pixel + costs.seconds_per_pixel_and_visit * n_visits)
        + fitted * (costs.seconds_fit_per_pixel + costs.seconds_fit_per_pixel_and_visit * n_visits),
        seconds_read=costs.seconds_read_per_pixel_and_visit * pixels * (1.0 + read_again),
        seconds_after=costs.seconds_after + costs.seconds_after_per_pixel * inner,
        memory_bytes=costs.memory_bytes + costs.memory_bytes_per_pixel * canvas + fit_bytes + kept,
        memory_after_bytes=costs.memory_after_bytes + costs.memory_after_bytes_per_pixel * inner,
        warp_bytes=costs.warp_bytes_per_pixel * pixels,
        output_bytes=costs.output_bytes_per_pixel * inner,
        disk_bytes=CACHE_BYTES * pixels - kept if cache_on_disk else 0.0,
    )


def job_requests(
    patch_size: int,
    n_visits: int,
    costs: Costs,
    cache_gib: float = DEFAULT_CACHE_GIB,
    cache_on_disk: bool = False,
) -> dict[str, dict[str, int]]:
    """Return what batch jobs shall ask for, in the words of BPS.

    Parameters
    ----------
    patch_size, n_visits, costs, cache_gib, cache_on_disk
        As in `estimate`.

    Returns
    -------
    requests : `dict` [`str`, `dict` [`str`, `int`]]
        By task label: ``requestMemory`` in MiB and ``requestWalltime`` in minutes, more than the estimate.
    """
    one = estimate(patch_size, n_visits, costs, cache_gib, cache_on_disk)
    before = _request(one.memory_bytes, one.seconds + one.seconds_read)
    after = _request(one.memory_after_bytes, one.seconds_after)
    return {"deepPriorCoadd": before, "measureDeepPriorCoadd": after, "plotDeepPriorCoadd": after}


def _request(size: float, seconds: float) -> dict[str, int]:
    return {
        "requestMemory": 512 * math.ceil(_SPARE_MEMORY * size / _MIB / 512),
        "requestWalltime": 10 * math.ceil((_SPARE_TIME * seconds / 60.0 + 5.0) / 10),
    }
