# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import pytest
import torch
from toy import observe

from lsst.coadd.deepprior import data_steps as module
from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.data_steps import data_steps, regain_flux
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData

LAYOUT = CellLayout(1, 2, 50, 34)
STARS = [(19.3, 22.6, 3000.0), (50.1, 30.2, 12.0)]
"""One star of S/N 400 or more, one near the noise."""


@pytest.fixture(scope="module")
def data() -> PatchData:
    return PatchData(observe(LAYOUT, STARS, [1.5, 1.7, 1.6], seed=5), LAYOUT, 0.9, margin=8)


@pytest.fixture(scope="module")
def latent(data: PatchData) -> torch.Tensor:
    return maximum_likelihood(data, data.sets()).latent[0]


def light(data: PatchData, latent: torch.Tensor, x: float, y: float) -> float:
    """Light within 4 pixels of a position of the patch."""
    image = inner_smooth(latent, data.sigma)
    row, column = round(y) + data.margin, round(x) + data.margin
    return float(image[row - 4 : row + 5, column - 4 : column + 5].sum())


def test_a_significant_source_gets_its_flux_back(data: PatchData, latent: torch.Tensor) -> None:
    taken = latent.clone()
    taken[15:46, 12:43] *= 0.9
    x, y, _ = STARS[0]
    back = data_steps(data, data.sets(), taken, torch.ones_like(latent))
    assert light(data, taken, x, y) == pytest.approx(0.9 * light(data, latent, x, y), rel=1e-3)
    assert light(data, back, x, y) == pytest.approx(light(data, latent, x, y), rel=2e-3)


def test_the_data_are_not_heard_on_a_source_near_the_noise(data: PatchData, latent: torch.Tensor) -> None:
    taken = latent.clone()
    taken[:, 45:] *= 0.5
    back = data_steps(data, data.sets(), taken, torch.ones_like(latent))
    x, y, _ = STARS[1]
    change = light(data, back, x, y) / light(data, taken, x, y) - 1.0
    assert -0.3 < change < 0.5


@pytest.mark.parametrize(("snr", "power"), [(20.0, 0.5), (10.0, 0.2), (60.0, 0.9)])
def test_a_step_is_a_half_at_a_signal_of_20_times_the_noise(
    snr: float, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a flat sky the data have twice what the image has: the step is 2 to the power s^2 / (20^2 + s^2)."""
    monkeypatch.setattr(module, "_STEPS", 1)
    visit = observe(LAYOUT, [], [1.6])[0]
    at = 8 + 25, 8 + 34
    flat = PatchData([visit], LAYOUT, 0.9, margin=8, huber_delta=1e9, dtype=torch.float64)
    noise = float(flat.matched_noise()[at])
    visit.flux[...] = 2.0 * snr * noise
    flat = PatchData([visit], LAYOUT, 0.9, margin=8, huber_delta=1e9, dtype=torch.float64)
    latent = torch.full(flat.shape, snr * noise, dtype=torch.float64)
    moved = regain_flux(flat, flat.sets(), latent)
    assert float(moved[at] / latent[at]) == pytest.approx(2.0**power, rel=1e-3)


def test_light_that_no_source_claims_is_left_out() -> None:
    """An image of a constant a hundredth of the noise, seen with S/N below 0.1, nearly vanishes."""
    data = PatchData(observe(LAYOUT, [], [1.5, 1.7, 1.6], seed=5), LAYOUT, 0.9, margin=8)
    sets = data.sets()
    faint = 0.01 * sets.sensitivity[0].clamp_min(1.0).rsqrt()
    assert float((sets.gram.forward(faint[None])[0] / data.matched_noise()).max()) < 0.1
    left = data_steps(data, sets, faint, torch.zeros_like(faint))
    assert float(left.max()) < 0.03 * float(faint.max())
    assert float(left.min()) >= 0.0


def test_where_the_network_is_shut_off_bright_pixels_do_not_change(
    data: PatchData, latent: torch.Tensor
) -> None:
    taken = 0.8 * latent
    same = data_steps(data, data.sets(), taken, torch.zeros_like(latent))
    sure = data.sets().gram.forward(taken[None])[0] > 20.0 * data.matched_noise()
    assert int(sure.sum()) > 30
    torch.testing.assert_close(same[sure], taken[sure], rtol=2e-3, atol=0.0)
