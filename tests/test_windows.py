# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Parts of a patch that a network is fitted on."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import observe

from lsst.coadd.deepprior import scratch, windows
from lsst.coadd.deepprior.finer import finer_layout, finer_observation
from lsst.coadd.deepprior.fit_checkpoint import FitCheckpoint
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.groups import deal_splits
from lsst.coadd.deepprior.network import Trunk
from lsst.coadd.deepprior.numerical_settings import MAX_SEED
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.scratch import fit_scratch
from lsst.coadd.deepprior.windows import cut_out, fit_windows

LAYOUT = CellLayout(4, 6, 20, 14)
SIGMA, MARGIN = 0.9, 5
STARS = [(20.2, 15.7, 900.0), (66.0, 60.4, 600.0)]


def visits_of(layout: CellLayout = LAYOUT) -> list[Observation]:
    """Four visits with masks; one begins and ends inside of cells and has no PSF in two."""
    visits = observe(layout, STARS, [1.6, 1.8, 2.0, 1.7], masked_fraction=0.1, seed=4, stamp=21)
    part = visits[3]
    part.psf[2, 1:3] = np.nan
    visits[3] = dataclasses.replace(
        part,
        flux=part.flux[25:70, 9:71],
        variance=2.0 * part.variance[25:70, 9:71],
        good=part.good[25:70, 9:71],
        noise=part.flux[25:70, 9:71],
        origin=(25, 9),
    )
    return visits


def record_splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that the numbers of splits that are asked for are added to."""
    asked: list[int] = []

    def deal(n_groups: int, n_splits: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(n_splits)
        return deal_splits(n_groups, n_splits, generator)

    monkeypatch.setattr(scratch, "deal_splits", deal)
    return asked


@pytest.fixture
def data() -> PatchData:
    return PatchData(visits_of(), LAYOUT, SIGMA, margin=MARGIN, dtype=torch.float64)


def test_parts_have_the_pixels_weights_and_psfs_of_the_patch(data: PatchData) -> None:
    """Far from the border of a part, its matched image is that of the patch."""
    block = (slice(1, 4), slice(1, 5))
    (part,) = cut_out(data, [block])
    assert part.layout == CellLayout(3, 4, 20, 14)
    assert part.sigma == data.sigma
    np.testing.assert_array_equal(part.weight, data.weight[:, *block])
    np.testing.assert_array_equal(part.good_fraction, data.good_fraction[:, *block])
    models = [torch.zeros(1, *one.shape, dtype=one.dtype) for one in (data, part)]
    whole, own = (one.linearise(one.sets(), model) for one, model in zip((data, part), models, strict=True))
    ys, xs = slice(20, 20 + part.shape[0]), slice(14, 14 + part.shape[1])
    inner = (slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    torch.testing.assert_close(own.coadd[0][inner], whole.coadd[0][ys, xs][inner])
    deep = (slice(25, -25), slice(25, -25))
    assert own.matched[0][deep].abs().max() > 0.0
    torch.testing.assert_close(own.matched[0][deep], whole.matched[0][ys, xs][deep])


def test_parts_without_a_good_pixel_and_visits_that_miss_them_are_left_out(data: PatchData) -> None:
    corner = cut_out(data, [(slice(0, 1), slice(0, 6)), (slice(2, 3), slice(1, 3))])
    assert [len(part) for part in corner] == [3, 3]
    blind = [dataclasses.replace(visit, good=visit.good.copy()) for visit in visits_of()[:3]]
    for visit in blind:
        visit.good[:40, :28] = False
    parts = cut_out(
        PatchData(blind, LAYOUT, SIGMA, margin=MARGIN),
        [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2))],
    )
    assert len(parts) == 1
    assert parts[0].layout == CellLayout(2, 2, 20, 14)


def test_parts_need_the_visits_no_more(data: PatchData) -> None:
    observations = data.observations
    (part,) = cut_out(data, [(slice(0, 2), slice(2, 5))])
    whole = [part.linearise(part.sets(), torch.zeros(1, *part.shape, dtype=part.dtype)).matched]
    for visit in observations:
        visit.flux[...] = np.nan
        visit.good[...] = False
    whole.append(part.linearise(part.sets(), torch.zeros(1, *part.shape, dtype=part.dtype)).matched)
    assert torch.equal(*whole)


def test_small_patches_are_fitted_whole(data: PatchData) -> None:
    assert fit_windows(data, 1) == [data]


def test_large_patches_have_a_window_in_each_quarter(
    data: PatchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80x84 pixels are more than twice 35 along both axes; windows of 2x3 cells are 40x42 of them."""
    monkeypatch.setattr(windows, "WINDOW", 35)
    assert [part.layout for part in fit_windows(data, 1)] == [CellLayout(2, 3, 20, 14)] * 4
    monkeypatch.setattr(windows, "WINDOW", 41)
    assert [part.layout for part in fit_windows(data, 1)] == [CellLayout(4, 3, 20, 14)] * 2
    monkeypatch.setattr(windows, "WINDOW", 17)
    parts = fit_windows(data, 1)
    assert [part.layout for part in parts] == [CellLayout(1, 2, 20, 14)] * 4


def test_windows_of_odd_numbers_of_cells_stay_in_their_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3x5 cells a quarter has 1x2, also where more would be needed for the side of a window."""
    monkeypatch.setattr(windows, "WINDOW", 29)
    layout = CellLayout(3, 5, 20, 14)
    data = PatchData(visits_of(layout), layout, SIGMA, margin=MARGIN)
    assert [part.layout for part in fit_windows(data, 1)] == [CellLayout(1, 2, 20, 14)] * 4


def test_windows_of_finer_pixels_are_those_of_the_visits(
    data: PatchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 35)
    visits = [finer_observation(visit, 2) for visit in data.observations]
    fine = PatchData(visits, finer_layout(LAYOUT, 2), 2.0 * SIGMA, margin=2 * MARGIN)
    assert [part.layout for part in fit_windows(fine, 1)] == [CellLayout(2, 3, 40, 28)] * 4


def test_windows_are_where_most_visits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where one of them is far deeper than all others together."""
    monkeypatch.setattr(windows, "WINDOW", 14)
    visits = visits_of()[:3]
    for visit in visits[1:]:
        visit.good[:20, 14:] = False
    visits[0].variance[:20, 14:] *= 0.01
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    for seed in range(5):
        counts = [len(part) for part in fit_windows(data, seed)]
        assert counts == [3, 3, 3, 3]
    places = {tuple(np.nansum(p.observations[0].flux) for p in fit_windows(data, s)) for s in range(5)}
    assert len(places) > 1
    again = [tuple(np.nansum(p.observations[0].flux) for p in fit_windows(data, 3)) for _ in range(2)]
    assert again[0] == again[1]


def test_without_two_groups_in_any_window_the_patch_is_fitted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two visits that share no cell."""
    monkeypatch.setattr(windows, "WINDOW", 14)
    visits = visits_of()[:2]
    visits[0].good[:, :42] = False
    visits[1].good[:, 42:] = False
    data = PatchData(visits, LAYOUT, SIGMA, margin=MARGIN)
    assert fit_windows(data, 1) == [data]


def test_fit_of_windows_lowers_the_objective_that_it_does_not_read(
    data: PatchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW", 35)
    settings = RestoreSettings(base_steps=20, steps=40, refresh_every=10, n_splits=8)
    reported: list[int] = []
    splits = record_splits(monkeypatch)
    net, curve = fit_scratch(data, settings, lambda phase, step, n_steps, loss: reported.append(step))
    assert splits == [2, 2, 2, 2]
    assert curve[-1][1] < curve[0][1]
    assert reported == [0, 10, 20, 30, 40]
    again, _ = fit_scratch(data, settings)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_fit_that_ends_in_the_dark_begins_anew(
    data: PatchData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the seed after the first one, also where it was interrupted; after three there is no network."""
    settings = RestoreSettings(base_steps=20, steps=8, refresh_every=4, n_splits=4, seed=MAX_SEED)
    expected, _ = fit_scratch(data, dataclasses.replace(settings, seed=0))
    tried: list[Trunk] = []

    def is_sound(net: Trunk) -> bool:
        tried.append(net)
        return len(tried) == 2

    def stop(phase: str, step: int, n_steps: int, loss: float) -> None:
        if tried and step == 4:
            raise KeyboardInterrupt

    def checkpoint() -> FitCheckpoint:
        return FitCheckpoint(tmp_path / "fit", 2, {}, logging.getLogger("fit"))

    with pytest.raises(KeyboardInterrupt):
        fit_scratch(data, settings, stop, checkpoint(), is_sound=is_sound)
    net, curve = fit_scratch(data, settings, None, checkpoint(), is_sound=is_sound)
    assert len(tried) == 2
    assert [step for step, _ in curve] == [0, 4, 8]
    assert net is not None
    for one, other in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "fit").unlink()
    with caplog.at_level(logging.INFO):
        assert fit_scratch(data, settings, None, checkpoint(), is_sound=is_sound)[0] is None
    assert len(tried) == 5
    assert caplog.text.count("The fit has 8 steps, 8 of them taken in this process") == 3


def test_fit_of_windows_that_was_interrupted_goes_on(
    data: PatchData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ends with the weights of one that was not."""
    monkeypatch.setattr(windows, "WINDOW", 35)
    settings = RestoreSettings(base_steps=20, steps=20, refresh_every=5, n_splits=8)
    whole, _ = fit_scratch(data, settings)

    def stop(phase: str, step: int, n_steps: int, loss: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    def checkpoint() -> FitCheckpoint:
        return FitCheckpoint(tmp_path / "fit", 4, {}, logging.getLogger("fit"))

    with pytest.raises(KeyboardInterrupt):
        fit_scratch(data, settings, stop, checkpoint())
    state = checkpoint().load()
    assert state is not None
    assert int(state["step"]) == 8
    net, _ = fit_scratch(data, settings, None, checkpoint())
    for one, other in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
