# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The table of the benchmark of speed: what was measured is shown, and what was not is not run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_report", ROOT / "benchmarks/speed_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(cache: Path, name: str, total: float, version: str = "new") -> None:
    phases = dict.fromkeys(
        ("read", "statistics", "base", "fit", "coadd", "noise", "psf", "write", "other"), 1.0
    )
    row = {"phases": phases, "total": total, "cpu": 2 * total, "peak_gb": 1.5, "load": 3.0}
    row |= {"measure_cpu": 7.0, "measure_peak_gb": 1.25}
    (cache / f"{name}-{version}.json").write_text(json.dumps(row))


def line(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def test_nothing_was_run(report: ModuleType, tmp_path: Path) -> None:
    text = report.make(tmp_path, "new", "a processor")
    targets = text.split("## Quanta")[0].splitlines()
    rows = [line for line in targets if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) >= 11
    assert all("| not run | - |" in row for row in rows)


def test_medians_verdicts_and_stale_numbers(report: ModuleType, tmp_path: Path) -> None:
    for repeat, total in enumerate((12.0, 10.0, 40.0)):
        write(tmp_path, f"quantum-512-16-pretrained-cpu-2-{repeat}", total)
        write(tmp_path, f"peer-512-16-richardson_lucy-2-{repeat}", 4.0)
    write(tmp_path, "quantum-512-32-pretrained-cpu-2-0", 99.0, version="old")
    text = report.make(tmp_path, "new", "a processor")
    assert "| at most 30 s | 12.0 s | yes |" in text
    assert "| at most 2 times | 3.0 times; 3.0 times in CPU s | no |" in text
    assert "not run" in line(text, "| 512 | 32 | pretrained | cpu |")
    measured = line(text, "| 512 | 16 | pretrained | cpu |").split(" | ")
    assert measured[4] == "12.0"
    # 512^2 pixels of 16 visits in 12 s.
    assert measured[-5:-2] == ["7", "1.25", "0.35"]


def test_seconds(report: ModuleType) -> None:
    begin, end = "2026-11-24T23:59:58.5+00:00", "2026-11-25T00:00:01+00:00"
    assert report.seconds_between(begin, end) == pytest.approx(2.5)
