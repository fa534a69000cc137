# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The calibration benchmark: what it injects and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table
from toy import observe

from lsst.coadd.deepprior.operators import CellLayout

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import calibration_report
import injection

LAYOUT = CellLayout(1, 2, 80, 45)


def entry(scatter: float, bias: float, rng: np.random.Generator, **more: Any) -> dict[str, Any]:
    """Return an object whose flux has an error of 1 % that is wrong by some factor, and a relative bias."""
    flux = 1000.0 * (1.0 + bias) + 10.0 * scatter * rng.standard_normal()
    position = {
        "dx": 0.1 * rng.standard_normal(),
        "dy": 0.1 * rng.standard_normal(),
        "x_err": 0.1,
        "y_err": 0.1,
    }
    measured = {"flux": flux, "flux_err": 10.0, "psf_flux": flux, "psf_flux_err": 10.0}
    where = {
        "group": "isolated",
        "type": "galaxy",
        "pair": -1,
        "mag": 22.5,
        "snr": 100.0,
        "true_flux": 1000.0,
    }
    return where | measured | position | more


def report(scatter: float, bias: float, n: int) -> str:
    rng = np.random.default_rng(1)
    objects = [entry(scatter, bias, rng) for _ in range(n)]
    row = {"objects": objects, "n_entries": n, "n_false": 1, "noise_excess": 1.0}
    return calibration_report.make({"standard": [row], "empty": []}, [], 400)


def line(text: str, start: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(f"| {start}")][:1]
    return found


def test_report_tells_lone_sources_from_those_with_a_companion() -> None:
    rng = np.random.default_rng(2)
    objects = [entry(1.0, 0.0, rng, lone=True) for _ in range(300)]
    objects += [entry(1.0, 0.05, rng, lone=False) for _ in range(300)]
    row = {"objects": objects, "n_entries": 600, "n_false": 0, "noise_excess": 1.0}
    text = calibration_report.make({"standard": [row], "empty": []}, [], 400)
    assert line(text, "galaxy 22-23").count("**no**") == 2
    assert line(text, "the lone ones of them | 300/300").count("yes") == 2
    assert "the lone ones" not in report(1.0, 0.0, 2000)


def test_report_judges_bias_and_pulls() -> None:
    assert line(report(1.0, 0.0, 2000), "galaxy 22-23").count("yes") == 2
    assert line(report(1.0, 0.03, 2000), "galaxy 22-23").count("**no**") == 2
    wide = line(report(1.5, 0.0, 2000), "galaxy 22-23")
    assert (wide.count("yes"), wide.count("**no**")) == (1, 1)
    assert line(report(1.5, 0.03, 150), "galaxy 22-23").count("too few") == 2
    text = report(1.0, 0.0, 2000)
    assert "1 of 2000, 0.05 %" in text
    assert text.count("Not run") == 2


def test_blends_are_those_with_two_entries() -> None:
    rng = np.random.default_rng(2)
    both = [entry(1.0, 0.0, rng, group="blend", pair=1, scene=0) for _ in range(2)]
    merged = [entry(1.0, 1.0, rng, group="blend", pair=2, scene=0)]
    split, alone = calibration_report._split([*both, *merged])
    assert (len(split), len(alone)) == (2, 1)


def test_objects_are_injected_at_their_place_with_their_flux() -> None:
    visits = observe(LAYOUT, [], [1.5, 2.2], noiseless=True, stamp=41)
    visits[1].good[30:34, 60:62] = False
    names = ("type", "x", "y", "flux_nJy", "hlr", "axis_ratio", "angle", "sersic_n")
    rows = [
        ("star", 25.3, 40.6, 500.0, 0.0, 1.0, 0.0, 0.0),
        ("galaxy", 60.4, 30.2, 800.0, 0.4, 0.6, 40.0, 1.0),
    ]
    found = injection.inject_into_warps(visits, Table(rows=rows, names=names), LAYOUT, 0.2)
    assert found[0].flux.sum() == pytest.approx(1300.0, rel=0.01)
    y, x = np.indices(LAYOUT.shape)
    near = np.hypot(x - 25.3, y - 40.6) < 12.0
    light = np.where(near, found[0].flux, 0.0)
    assert (light.sum(), (light * x).sum() / light.sum(), (light * y).sum() / light.sum()) == pytest.approx(
        (500.0, 25.3, 40.6), rel=0.01
    )
    assert np.isfinite(found[1].flux[found[1].good]).all()
    assert found[1].flux.max() < found[0].flux.max()


def test_isolation_depends_on_distance_and_brightness() -> None:
    others = np.array([100.0, 100.0, 100.0]), np.array([106.0, 113.0, 128.0])
    quiet = injection.disturbed(100.0, 100.0, 1.0, *others, np.array([0.05, 0.9, 9.0]), 0.2)
    assert not quiet.any()
    loud = injection.disturbed(100.0, 100.0, 1.0, *others, np.array([0.2, 1.1, 11.0]), 0.2)
    assert loud.all()
