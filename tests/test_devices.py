# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from accelerator import ACCELERATOR, PretendedAccelerator, WrongDeviceError
from toy import observe

from lsst.coadd.deepprior import psf_refinement
from lsst.coadd.deepprior.conditions import AXES
from lsst.coadd.deepprior.fit import make_trunk
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.multiband import restore_bands
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf_refinement import refine_psfs
from lsst.coadd.deepprior.psf_sky import RefinementSky
from lsst.coadd.deepprior.restore import restore
from lsst.coadd.deepprior.training import Trainer, TrainingPatch, TrainSettings
from lsst.coadd.deepprior.weights import TrainedNetwork

LAYOUT = CellLayout(2, 1, 20, 33)
SETTINGS = RestoreSettings(steps=4, base_steps=25, n_splits=2, refresh_every=2, n_variance_draws=1)


def visits_of_all_kinds() -> list[Observation]:
    """Fourteen visits in twelve groups, with masks, PSFs that vary, a missing cell, and an outlier."""
    sigmas = list(np.linspace(1.5, 2.1, 14))
    visits = observe(LAYOUT, [(15.2, 12.7, 900.0)], sigmas, seed=1, masked_fraction=0.1, stamp=15)
    visits[1].psf[1, 0] = visits[2].psf[0, 0]
    visits[3].psf[0, 0] = np.nan
    visits[4].flux[30, 3:20] += 90.0
    return visits


def test_pretended_accelerator_finds_what_is_on_the_wrong_device() -> None:
    with PretendedAccelerator():
        there = torch.ones(3, device=ACCELERATOR)
        assert there.device == ACCELERATOR
        assert (there[1:] * 2.0).device == ACCELERATOR
        assert torch.zeros_like(there).device == ACCELERATOR
        assert torch.ones(3).to(ACCELERATOR).device == ACCELERATOR
        assert there.cpu().device == torch.ones(3).device == torch.device("cpu")
        np.testing.assert_array_equal((there + torch.tensor(1.0)).cpu().numpy(), 2.0)
        assert there[torch.tensor([0, 2])].device == ACCELERATOR
        with pytest.raises(WrongDeviceError, match="add"):
            there + torch.ones(3)
        with pytest.raises(WrongDeviceError, match="stack"):
            torch.stack([there, torch.arange(3.0)])
        with pytest.raises(WrongDeviceError, match="numpy"):
            there.numpy()
        net = torch.nn.Conv2d(1, 1, 3)
        with pytest.raises(WrongDeviceError, match="conv2d"):
            net(torch.ones(1, 1, 4, 4, device=ACCELERATOR))
        assert net.to(ACCELERATOR)(torch.ones(1, 1, 4, 4, device=ACCELERATOR)).device == ACCELERATOR


@pytest.mark.parametrize("start", ["scratch", "trained"])
def test_restoration_makes_every_tensor_where_it_computes(start: str) -> None:
    network = None
    if start == "trained":
        trunk = make_trunk(1, torch.device("cpu"), torch.float32)
        network = TrainedNetwork(trunk, dict.fromkeys(AXES, (-1e6, 1e6)), {})
    visits = visits_of_all_kinds()
    expected = restore(visits, LAYOUT, SETTINGS, network=network)
    with PretendedAccelerator():
        result = restore(visits, LAYOUT, SETTINGS, network=network, device=ACCELERATOR)
    np.testing.assert_array_equal(result.image, expected.image)
    np.testing.assert_array_equal(result.variance, expected.variance)


def test_bands_are_coupled_where_they_are_restored() -> None:
    visits = visits_of_all_kinds()
    bands = {"g": visits[:4], "r": visits[5:9], "i": visits[9:]}
    settings = dataclasses.replace(SETTINGS, steps=0)
    expected = restore_bands(bands, LAYOUT, settings)
    with PretendedAccelerator():
        result = restore_bands(bands, LAYOUT, settings, device=ACCELERATOR)
    for band, one in expected.items():
        np.testing.assert_array_equal(result[band].image, one.image)
        np.testing.assert_array_equal(result[band].variance, one.variance)


@pytest.mark.parametrize("n_stars", [5, 3])
def test_psfs_are_learned_where_patches_are_restored(n_stars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stars that anchor them, and with too few."""
    devices = []

    class Noted(RefinementSky):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            devices.append(self.other_light.device)

    layout = CellLayout(1, 1, 76, 80)
    places = [(16.3, 18.6), (40.1, 58.2), (62.7, 20.4), (18.2, 54.8), (60.4, 50.3)]
    stars = [(x, y, 2000.0) for x, y in places[:n_stars]]
    visits = observe(layout, stars, [1.7, 2.1], seed=3, masked_fraction=0.01, stamp=23)
    expected = refine_psfs(visits, layout, base_steps=5)
    assert expected.anchored == (n_stars == 5)
    monkeypatch.setattr(psf_refinement, "RefinementSky", Noted)
    with PretendedAccelerator():
        result = refine_psfs(visits, layout, base_steps=5, device=ACCELERATOR)
    assert set(devices) == {ACCELERATOR}
    for name in ("stamps", "flux_scale", "shift", "background", "stars", "fwhm_error"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))


def test_training_makes_every_tensor_where_it_computes() -> None:
    settings = TrainSettings(steps=3, n_splits=2, refresh_every=2, checkpoint_every=2, base_steps=5)
    patch = TrainingPatch("patch", visits_of_all_kinds()[:4], LAYOUT)
    states: list[dict[str, torch.Tensor]] = []
    with PretendedAccelerator():
        trainer = Trainer([patch], settings, device=ACCELERATOR)
        trainer.run(checkpoint=states.append)
        again = Trainer([patch], settings, device=ACCELERATOR)
        again.load_state({name: tensor.cpu() for name, tensor in states[0].items()})
        again.run()
        data = [one.network({}).to_bytes() for one in (trainer, again)]
    plain = Trainer([dataclasses.replace(patch)], settings)
    plain.run()
    assert data[0] == data[1] == plain.network({}).to_bytes()
