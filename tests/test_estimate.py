# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The estimates of time, memory and storage, against what was measured and what is known."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lsst.coadd.deepprior import windows
from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.estimate import (
    CACHE_BYTES,
    CANVAS_MARGIN,
    DEFAULT_CACHE_GIB,
    FIT_SIDE,
    FITTED_WHOLE,
    STARTS,
    Costs,
    estimate,
    job_requests,
)
from lsst.coadd.deepprior.fitted_patch import MARGIN
from lsst.coadd.deepprior.warp_streams import default_cache_bytes
from lsst.coadd.deepprior.warps import Warp

ROOT = Path(__file__).parents[1]
FILE = ROOT / "config/costs/cpu.json"
NO_FIT = {
    "seconds_fit_per_pixel": 0.0,
    "seconds_fit_per_pixel_and_visit": 0.0,
    "memory_fit_bytes_per_pixel": 0.0,
}
UNIT = Costs(
    **(dict.fromkeys((field.name for field in dataclasses.fields(Costs)), 1.0) | {"passes": 11.0} | NO_FIT)
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["estimate", *arguments])


def test_known_costs() -> None:
    """With all constants 1: a canvas of 100 pixels square is 68 of the patch."""
    one = estimate(68, 3, UNIT)
    assert one.seconds == 1 + 100**2 * (1 + 3)
    assert one.seconds_read == 68**2 * 3
    assert one.seconds_after == 1 + 68**2
    assert one.memory_bytes == 1 + 100**2 + CACHE_BYTES * 68**2 * 3
    assert one.memory_after_bytes == 1 + 68**2
    assert one.warp_bytes == 68**2 * 3
    assert one.output_bytes == 68**2


def test_warps_that_the_cache_does_not_hold_are_read_in_every_pass() -> None:
    size = CACHE_BYTES * 64**2 * 4
    whole = estimate(64, 4, UNIT, size / 2**30)
    half = estimate(64, 4, UNIT, size / 2 / 2**30)
    none = estimate(64, 4, UNIT, 0.0)
    assert half.seconds_read == pytest.approx((1 + 10 / 2) * whole.seconds_read)
    assert none.seconds_read == pytest.approx(11 * whole.seconds_read)
    assert whole.memory_bytes - none.memory_bytes == pytest.approx(size)


def test_a_disk_saves_most_of_the_reading() -> None:
    """What memory does not hold is on disk, and is read from there in each of the ten later passes."""
    size = CACHE_BYTES * 64**2 * 4
    costs = dataclasses.replace(UNIT, disk_share=0.25)
    half = estimate(64, 4, costs, size / 2 / 2**30, cache_on_disk=True)
    assert half.seconds_read == pytest.approx((1 + 0.25 * 10 / 2) * 64**2 * 4)
    assert half.disk_bytes == pytest.approx(size / 2)
    assert estimate(64, 4, UNIT, size / 2 / 2**30).disk_bytes == 0.0
    assert estimate(64, 4, UNIT, 2 * size / 2**30, cache_on_disk=True).disk_bytes == 0.0


def test_a_fit_costs_what_its_windows_do() -> None:
    """Whole patches up to those that are fitted whole; beyond, the same, and the pixels of windows."""
    costs = dataclasses.replace(
        UNIT, seconds_fit_per_pixel=5.0, seconds_fit_per_pixel_and_visit=7.0, memory_fit_bytes_per_pixel=9.0
    )
    for side, fitted, kept in ((68, 100**2, 0), (3300, 632**2, CACHE_BYTES * 4 * 600**2 * 3)):
        one, plain = estimate(side, 3, costs), estimate(side, 3, UNIT)
        assert one.seconds - plain.seconds == fitted * (5 + 7 * 3)
        assert one.memory_bytes - plain.memory_bytes == 9 * fitted + kept


def test_what_the_estimate_knows_of_the_numerics(warps: list[Warp]) -> None:
    assert CANVAS_MARGIN == MARGIN
    assert windows._halves(FITTED_WHOLE // 128, 128, 1) == [(range(1), FITTED_WHOLE // 128)]
    assert [number * 150 for _, number in windows._halves(22, 150, 1)] == [FIT_SIDE] * 2
    assert default_cache_bytes(1e15) == DEFAULT_CACHE_GIB * 2**30
    observation = warps[0].observation(["BAD"])
    pixel = sum(a.dtype.itemsize for a in (observation.flux, observation.variance, observation.good))
    assert pixel == CACHE_BYTES


@pytest.mark.parametrize("start", STARTS)
def test_measured_patches_are_estimated_right(start: str) -> None:
    """The constants of the package give back the times and memories that they come from."""
    rows = json.loads(FILE.read_text())["measured"]
    costs = Costs.read(start)
    for row in rows[f"time {start}"]:
        assert row["method"].endswith("scratch") == (start == "scratch")
        one = estimate(row["side"], row["visits"], costs)
        assert one.seconds == pytest.approx(row["seconds"], rel=costs.largest_relative_deviation + 1e-9)
    (fit,) = rows[f"memory {start}"]
    largest = max([*rows[f"time {start}"], fit], key=lambda one: one["side"])
    for row in (fit, largest):
        one = estimate(row["side"], row["visits"], costs)
        assert one.memory_bytes == pytest.approx(row["peak_bytes"], rel=0.05)
        assert one.memory_after_bytes == pytest.approx(row["peak_bytes_after"], rel=0.05)
    assert one.warp_bytes == pytest.approx(row["warp_bytes"] * row["visits"])
    assert one.output_bytes == pytest.approx(row["output_bytes"])


def test_constants_follow_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the package is what the benchmark makes of its rows."""
    spec = importlib.util.spec_from_file_location("costs", ROOT / "benchmarks/costs.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    stored = json.loads(FILE.read_text())
    for start in STARTS:
        monkeypatch.setattr(benchmark, "passes", lambda start: stored["starts"][start]["passes"])
        monkeypatch.setattr(benchmark, "disk_share", lambda one=start: stored["starts"][one]["disk_share"])
        rows = (stored["measured"][f"{name} {start}"] for name in ("time", "memory"))
        without_fit = stored["starts"]["pretrained"] if start == "scratch" else None
        assert benchmark.fit(*rows, without_fit) == pytest.approx(stored["starts"][start])


def test_requests_leave_room() -> None:
    costs = Costs.read("pretrained")
    one = estimate(3400, 20, costs)
    requests = job_requests(3400, 20, costs)
    assert requests.keys() == {"deepPriorCoadd", "measureDeepPriorCoadd", "plotDeepPriorCoadd"}
    memory = requests["deepPriorCoadd"]["requestMemory"] * 2**20
    assert 2 * one.memory_bytes <= memory < 2 * one.memory_bytes + 2**29
    minutes = requests["deepPriorCoadd"]["requestWalltime"]
    assert 2 * (one.seconds + one.seconds_read) <= 60 * minutes


def test_impossible_patches_are_refused() -> None:
    for size, visits, cache in ((0, 3, 4.0), (100, 0, 4.0), (100, 3, -1.0), (100, 3, math.nan)):
        with pytest.raises(ValueError, match=f"got {size} pixels, {visits} visits and {cache} GiB"):
            estimate(size, visits, UNIT, cache)
    with pytest.raises(ValueError, match="'cold' is none of pretrained, scratch"):
        Costs.read("cold")


def test_table() -> None:
    """Bands add up, and patches multiply."""
    result = run("--visits", "g=8,r=18", "--patches", "2000")
    assert result.exit_code == 0, result.output
    head, g, r, both = (line.split() for line in result.output.splitlines())
    assert head[:2] == ["band", "visits"]
    assert [g[0], r[0], both[0]] == ["g", "r", "all"]
    assert [g[1], r[1], both[1]] == ["8", "18", "26"]
    hours = [float(row[2].replace(",", "")) for row in (g, r, both)]
    assert hours[0] + hours[1] == pytest.approx(hours[2], abs=2)
    expected = 2000 * estimate(3400, 18, Costs.read("pretrained")).seconds / 3600
    assert hours[1] == pytest.approx(expected, abs=1)


def test_requests_name_the_command_that_makes_them_again(tmp_path: Path) -> None:
    own = tmp_path / "own costs.json"
    own.write_text(FILE.read_text())
    for options in (
        [],
        ["--visits", "184", "--cache-on-disk"],
        ["--visits", "u=3,r=184", "--start", "scratch", "--cache-gib", "2.25", "--costs", str(own)],
    ):
        result = run("--bps", *options)
        assert result.exit_code == 0, result.output
        words = shlex.split(result.output.splitlines()[0])
        assert words[:3] == ["#", "deepprior", "estimate"]
        assert run(*words[3:]).output == result.output
        assert ("--cache-on-disk" in words) == ("--cache-on-disk" in options)
    assert words[-2:] == ["--costs", str(own)]
    assert words[-4:-2] == ["--cache-gib", "2.25"]
    stored = (ROOT / "config/bps/requests.yaml").read_text().splitlines()[0]
    assert run("--bps").output.splitlines()[0] == stored


def test_bad_questions(tmp_path: Path) -> None:
    for text in ("", "=3", "g=", "g=0", "r=1=2", "g=3,,r=4", "few", "g=3,5", "3,5"):
        result = run("--visits", text)
        assert result.exit_code == 2
        assert "neither a number of visits nor a list like g=8,r=18" in result.output
    result = run("--cache-gib", "nan")
    assert result.exit_code == 2
    assert "nan is no size" in result.output
    result = run("--device", "cuda")
    assert result.exit_code == 1
    assert (
        "There are no measured costs for cuda: measure them with 'python benchmarks/costs.py" in result.output
    )
    other = tmp_path / "costs.json"
    other.write_text('{"starts": {"pretrained": {"seconds": 3}}}')
    result = run("--costs", str(other))
    assert result.exit_code == 1
    assert f"{other} is no file of benchmarks/costs.py" in result.output
    other.write_bytes(b"\xff\xfe")
    result = run("--costs", str(other))
    assert result.exit_code == 1
    assert f"{other} is no file of benchmarks/costs.py" in result.output
    result = run("--costs", str(tmp_path))
    assert result.exit_code == 1
    assert f"Error: {tmp_path} cannot be read: Is a directory." in result.output
