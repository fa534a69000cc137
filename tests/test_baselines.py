# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import observe

from lsst.coadd.deepprior.baselines import (
    AcceleratedSteps,
    maximum_likelihood,
    maximum_likelihood_step,
    robust_start,
)
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.statistics import SetStatistics, VisitSets

LAYOUT, MARGIN = CellLayout(1, 2, 40, 30), 8
CENTRE = MARGIN + 20, MARGIN + 30


@pytest.mark.parametrize(
    ("sky", "model", "expected"), [(20.0, 10.0, 20.0), (20.0, 0.1, 1.0), (20.0, 4000.0, 400.0)]
)
def test_a_step_goes_to_the_data_but_no_further_than_a_factor_of_ten(
    sky: float, model: float, expected: float
) -> None:
    visit = observe(LAYOUT, [], [1.6])[0]
    visit.flux[...] = sky
    data = PatchData([visit], LAYOUT, 0.9, margin=MARGIN, huber_delta=1e9, dtype=torch.float64)
    latent = torch.full((1, *data.shape), model, dtype=torch.float64)
    moved = maximum_likelihood_step(latent, data.linearise(data.sets(), latent))
    assert float(moved[0, *CENTRE]) == pytest.approx(expected)


@pytest.mark.parametrize(("sigma", "damped"), [(0.7, True), (0.85, False)])
def test_visits_sharper_than_the_target_do_not_make_the_steps_diverge(sigma: float, damped: bool) -> None:
    """The division by a wider target amplifies fine waves, which steps of full length would do once more."""
    flux, layout = 20000.0, CellLayout(1, 1, 60, 60)
    visits = observe(layout, [(30.3, 29.6, flux)], [sigma, 1.05 * sigma, 1.1 * sigma], stamp=17)
    data = PatchData(visits, layout, 0.85)
    sets = data.sets()
    solution = maximum_likelihood(data, sets)
    assert float(solution.statistics.objective) < 2.0
    assert float(solution.latent[0, 36:56, 36:56].sum()) == pytest.approx(flux, rel=0.02)
    assert (sets.damping is not None) == damped


def test_extrapolation_keeps_a_tenth_of_a_falling_pixel() -> None:
    """Two equal corrections are followed by a third of nearly the same length."""
    images = [torch.tensor([[values]]) for values in ([20.0, 0.5], [30.0, 0.1], [40.0, 0.1])]
    starts = []

    def update(latent: torch.Tensor) -> torch.Tensor:
        starts.append(latent.clone())
        return images[len(starts) - 1].clone()

    steps = AcceleratedSteps(torch.tensor([[[10.0, 1.0]]]))
    for _ in range(3):
        steps.step(update)
    torch.testing.assert_close(starts[1], images[0])
    torch.testing.assert_close(starts[2], torch.tensor([[[40.0, 0.01]]]), rtol=2e-3, atol=0.0)


def test_the_error_of_the_psf_shrinks_from_refresh_to_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is so large that no core of a star is clipped, the last is that of the data."""
    data = PatchData(observe(LAYOUT, [], [1.6, 1.8]), LAYOUT, 0.9, margin=MARGIN, psf_error=0.01)
    errors = []

    def noted(sets: VisitSets, latent: torch.Tensor, *, psf_error: float | None = None) -> SetStatistics:
        errors.append(data.psf_error if psf_error is None else psf_error)
        return linearise(sets, latent, psf_error=psf_error)

    linearise = data.linearise
    monkeypatch.setattr(data, "linearise", noted)
    maximum_likelihood(data, data.sets(), steps=100)
    assert errors[0] >= 1.0
    assert all(np.diff(errors[:5]) < 0.0)
    assert errors[4:] == [0.01, 0.01]


def test_the_sharp_start_has_the_cores_of_stars() -> None:
    """Those of the median; the sky and what is beyond the data are smooth."""
    visits = observe(LAYOUT, [(30.0, 20.0, 5000.0)], [1.5, 1.5, 1.5], seed=3)
    data = PatchData(visits, LAYOUT, 0.9, margin=MARGIN)
    sets = data.sets()
    smooth, sharp = (image[0] for image in robust_start(data, sets))
    peak = float(data.lower_median(sets)[0, *CENTRE])
    assert peak == pytest.approx(5000.0 / (2.0 * np.pi * 1.5**2), rel=0.02)
    assert float(sharp[CENTRE]) == pytest.approx(peak, rel=0.01)
    assert float(smooth[CENTRE]) < 0.6 * peak
    sky = np.s_[MARGIN : MARGIN + 10, MARGIN : MARGIN + 15]
    assert float((sharp - smooth)[sky].abs().max()) < 0.2 * float(smooth[sky].max())
    torch.testing.assert_close(sharp[:4], smooth[:4])


def test_pixels_too_dark_to_come_back_are_zero() -> None:
    """Numbers whose squares are too small for normal ones of float32 take a processor many times as long."""
    visit = observe(LAYOUT, [(20.0, 30.0, 3000.0)], [1.6], seed=4)[0]
    visit.flux[:, :20] = -30.0
    data = PatchData([visit], LAYOUT, 0.9, margin=MARGIN)
    latent = maximum_likelihood(data, data.sets(), steps=60).latent
    dark = latent[0, MARGIN + 5 : MARGIN + 35, MARGIN + 2 : MARGIN + 12]
    assert bool((dark == 0.0).all())
    smallest = float(latent[latent > 0.0].min().square())
    assert smallest > torch.finfo(torch.float32).tiny
