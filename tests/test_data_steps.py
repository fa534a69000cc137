# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import pytest
import torch
from toy import observe

from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood
from lsst.coadd.deepprior.data_steps import data_steps
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.statistics import PatchData

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


def test_what_the_data_are_not_sure_of_stays(data: PatchData, latent: torch.Tensor) -> None:
    taken = latent.clone()
    taken[:, 45:] *= 0.5
    back = data_steps(data, data.sets(), taken, torch.ones_like(latent))
    x, y, _ = STARS[1]
    change = light(data, back, x, y) - light(data, taken, x, y)
    assert 0.0 <= change < 0.5 * light(data, taken, x, y)
    far = (slice(14, 26), slice(60, 70))
    torch.testing.assert_close(back[far], taken[far], rtol=0.05, atol=1e-3)


def test_where_the_network_is_shut_off_nothing_changes(data: PatchData, latent: torch.Tensor) -> None:
    taken = 0.8 * latent
    torch.testing.assert_close(
        data_steps(data, data.sets(), taken, torch.zeros_like(latent)), taken, rtol=0, atol=0
    )
