# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from toy import gaussian_stars, observe

from lsst.coadd.deepprior import visit_kernels
from lsst.coadd.deepprior.baselines import inner_smooth, maximum_likelihood, maximum_likelihood_step
from lsst.coadd.deepprior.fit import SplitLoss, make_trunk
from lsst.coadd.deepprior.groups import MAX_GROUPS, deal_splits
from lsst.coadd.deepprior.observation import Observation
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import NothingToRestoreError, PatchData

LAYOUT = CellLayout(2, 3, 22, 17)
SMALL = CellLayout(1, 2, 18, 21)
SIGMA = 0.9
STARS = [(20.2, 15.7, 900.0), (36.0, 30.4, 300.0)]


def five_visits() -> list[Observation]:
    """Five visits with masks, an outlier, PSFs that vary from cell to cell, a partial visit and one without a
    PSF in a cell."""
    visits = observe(LAYOUT, STARS, [1.5, 1.8, 2.1, 1.6, 1.9], masked_fraction=0.1, seed=2)
    visits[1].flux[5:8, 7:30] += 80.0
    visits[2].psf[1, 2] = observe(LAYOUT, [], [2.4])[0].psf[0, 0]
    visits[4].psf[0, 1] = np.nan
    part = visits[3]
    visits[3] = dataclasses.replace(
        part,
        flux=part.flux[7:40, 11:45],
        variance=part.variance[7:40, 11:45] * 2.0,
        good=part.good[7:40, 11:45],
        origin=(7, 11),
    )
    return visits


@pytest.fixture
def data() -> PatchData:
    """The five visits, a group each."""
    return PatchData(five_visits(), LAYOUT, SIGMA, margin=5, dtype=torch.float64)


@pytest.fixture
def grouped() -> PatchData:
    """Nineteen visits in twelve groups, four of them as in `data` and one without a good pixel."""
    sigmas = [1.5 + 0.05 * index for index in range(14)]
    visits = five_visits() + observe(LAYOUT, STARS, sigmas, masked_fraction=0.2, seed=3)
    visits[7].good[...] = False
    return PatchData(visits, LAYOUT, SIGMA, margin=5, dtype=torch.float64)


def direct_objective(
    data: PatchData, member: torch.Tensor, model: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """Robust objective visit by visit, from its definition, with the scale s of a reference model."""
    total = torch.zeros((), dtype=model.dtype)
    delta = data.huber_delta
    for index, visit in data.visits():
        if member[data.group[index]]:
            good = visit.weight > 0
            scale = torch.where(good, data.scale(visit, visit.kernel.forward(reference)), 1.0)
            r = (visit.flux - visit.kernel.forward(model)) / scale
            rho = torch.where(r.abs() <= delta, 0.5 * r * r, delta * (r.abs() - 0.5 * delta))
            total = total + (visit.weight * scale.square() * rho).sum()
    return total


def some_model(data: PatchData, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.rand(data.shape, generator=generator, dtype=torch.float64).to(data.dtype)


def some_members(data: PatchData) -> torch.Tensor:
    """All groups, and all but the second and the last."""
    members = torch.ones(2, data.n_groups, dtype=torch.bool)
    members[1, [1, -1]] = False
    return members


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("fixture", ["data", "grouped"])
def test_gradient_at_the_linearisation_is_that_of_the_visits(
    fixture: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    """With masks, clipping, PSFs that vary, edges, and groups of one and of several visits."""
    made = request.getfixturevalue(fixture)
    data = PatchData(made.observations, LAYOUT, SIGMA, margin=5, dtype=dtype)
    members = some_members(data)
    models = torch.stack([some_model(data, 1), some_model(data, 2)])
    statistics = data.linearise(data.sets(members), models)
    gradient = statistics.sets.gram.forward(models) - statistics.matched
    of_prediction = statistics.coverage * statistics.sets.gram.forward(models) - statistics.seen
    for index, (member, model, *surrogates) in enumerate(
        zip(members, models, gradient, of_prediction, strict=True)
    ):
        u = model.to(torch.float64).requires_grad_()
        objective = direct_objective(made, member, u, u.detach())
        n_pixels = float(statistics.sets.n_pixels[index])
        assert float(statistics.objective[index]) == pytest.approx(objective.item() / n_pixels, rel=tolerance)
        (expected,) = torch.autograd.grad(objective, u)
        for surrogate in surrogates:
            error = (surrogate.to(torch.float64) - expected).norm()
            assert float(error) < tolerance * float(expected.norm())


@pytest.mark.parametrize("n_visits", [3, 15])
def test_surrogate_lies_above_the_objective(n_visits: int) -> None:
    """With one PSF and weight a visit the quadratic bounds the robust objective from above everywhere."""
    sigmas = [1.5 + 0.06 * index for index in range(n_visits)]
    visits = observe(LAYOUT, STARS, sigmas, masked_fraction=0.2, seed=3)
    visits[1].flux[5:8, 7:30] += 80.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=5, dtype=torch.float64)
    model = some_model(data, 1)
    statistics = data.linearise(data.sets(), model[None])
    member = statistics.sets.members[0]
    at_model = direct_objective(data, member, model, model)

    def quadratic(u: torch.Tensor) -> torch.Tensor:
        return (0.5 * u * statistics.sets.gram.forward(u)[0] - u * statistics.matched[0]).sum()

    gaps = []
    for seed in range(2, 10):
        # From next to the model to far from it.
        other = model + 10.0 ** (seed / 2 - 3) * (some_model(data, seed) - model)
        bound = at_model + quadratic(other) - quadratic(model)
        gaps.append(float(bound - direct_objective(data, member, other, model)))
    assert min(gaps) > 0.0


def test_one_psf_one_weight_and_no_edges_make_both_equal_everywhere() -> None:
    """The quadratic and the objective differ by a constant, for models away from the edges."""
    visits = observe(LAYOUT, STARS, [1.5] * 14, seed=4, stamp=11)
    data = PatchData(visits, LAYOUT, SIGMA, margin=5, huber_delta=1e9, psf_error=0.0, dtype=torch.float64)
    inside = torch.zeros(data.shape, dtype=torch.float64)
    inside[10:-10, 10:-10] = 1.0
    zero = torch.zeros_like(inside)
    statistics = data.linearise(data.sets(), zero[None])
    member = statistics.sets.members[0]
    constant = direct_objective(data, member, zero, zero)
    for seed in range(4):
        u = 10.0**seed * inside * some_model(data, seed)
        quadratic = (0.5 * u * statistics.sets.gram.forward(u)[0] - u * statistics.matched[0]).sum()
        exact = direct_objective(data, member, u, zero)
        assert float(constant + quadratic) == pytest.approx(float(exact), rel=1e-10)
        again = data.linearise(statistics.sets, u[None])
        torch.testing.assert_close(again.matched, statistics.matched, rtol=1e-8, atol=1e-7)


def falling_objectives(data: PatchData) -> tuple[list[bool], list[bool]]:
    """Refresh, take plain steps, and say of every refresh whether surrogate and objective fell."""
    sets = data.sets()
    u = torch.maximum(data.lower_median(sets), torch.tensor(0.1, dtype=data.dtype))
    fell: tuple[list[bool], list[bool]] = ([], [])
    for _ in range(6):
        statistics = data.linearise(sets, u)
        before, u0 = direct_objective(data, sets.members[0], u[0], u[0]), u
        for _ in range(5):
            prediction = sets.gram.forward(u).clamp_min(1e-30)
            u = u * statistics.matched.clamp_min(0.0) / prediction
        change = (0.5 * (u * sets.gram.forward(u) - u0 * sets.gram.forward(u0))).sum() - (
            (u - u0) * statistics.matched
        ).sum()
        fell[0].append(float(change) < 0.0)
        fell[1].append(bool(direct_objective(data, sets.members[0], u[0], u[0]) < before))
    return fell


@pytest.mark.parametrize("seed", [1, 2])
def test_objective_falls_at_every_refresh_whose_surrogate_fell(seed: int) -> None:
    """Scenes with several PSFs, masks and outliers, also with PSFs that vary and a visit that ends inside."""
    rng = np.random.default_rng(seed)
    plain = observe(LAYOUT, STARS, list(rng.uniform(1.4, 2.2, 8 * seed - 2)), masked_fraction=0.15, seed=seed)
    for visit in (plain[0], plain[3]):
        y, x = rng.integers(0, 35, 2)
        visit.flux[y : y + 3, x : x + 12] += 200.0
    for visits in (plain, five_visits()):
        data = PatchData(visits, LAYOUT, SIGMA, margin=5, psf_error=0.0, dtype=torch.float64)
        surrogate, objective = falling_objectives(data)
        assert sum(surrogate) >= 4
        assert all(fell for fell, expected in zip(objective, surrogate, strict=True) if expected)


def varying_psfs(layout: CellLayout, sigma: float, sense: float, stamp: int = 27) -> np.ndarray:
    """PSFs whose FWHM changes by 10 % from corner to corner and ellipticity by 0.05 across the patch."""
    y, x = np.mgrid[:stamp, :stamp] - stamp // 2
    psf = np.empty((layout.n_i, layout.n_j, stamp, stamp))
    for i in range(layout.n_i):
        for j in range(layout.n_j):
            up, right = 2 * i / (layout.n_i - 1) - 1, 2 * j / (layout.n_j - 1) - 1
            ixx, iyy, ixy = second_moments(sigma, sense, up, right)
            chi2 = (iyy * x * x - 2 * ixy * x * y + ixx * y * y) / (ixx * iyy - ixy**2)
            psf[i, j] = np.exp(-0.5 * chi2)
    return psf / psf.sum(axis=(2, 3), keepdims=True)


def second_moments(sigma: float, sense: float, up: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """Second moments of the PSF at a position from -1 to 1 across the centres of the cells."""
    size = (sigma * (1.0 + 0.025 * (up + sense * right))) ** 2
    return size * (1.0 + 0.025 * sense * right), size * (1.0 - 0.025 * sense * right), size * 0.025 * up


def glow_visits(layout: CellLayout, height: float, width: float) -> tuple[list[Observation], float]:
    """Noiseless visits of a broad glow, whose PSFs vary smoothly over the patch and are given by cell; one
    ends inside a cell. Returns them with the noise of their coadd that they claim."""
    sigmas = [1.6, 1.9, 1.7, 2.1, 1.8, 2.0]
    y, x = np.mgrid[: layout.shape[0], : layout.shape[1]].astype(float)
    up = ((y + 0.5) / layout.height - 0.5 * layout.n_i) / (0.5 * (layout.n_i - 1))
    right = ((x + 0.5) / layout.width - 0.5 * layout.n_j) / (0.5 * (layout.n_j - 1))
    dy, dx = y - 0.55 * layout.shape[0], x - 0.45 * layout.shape[1]
    noise = len(sigmas) ** -0.5
    visits = []
    for index, sigma in enumerate(sigmas):
        sense = 1.0 if index % 2 else -1.0
        ixx, iyy, ixy = second_moments(sigma, sense, up, right)
        ixx, iyy = ixx + width**2, iyy + width**2
        det = ixx * iyy - ixy**2
        chi2 = (iyy * dx * dx - 2 * ixy * dx * dy + ixx * dy * dy) / det
        flux = height * noise * width**2 / np.sqrt(det) * np.exp(-0.5 * chi2)
        end = layout.shape[1] - (layout.width * 3) // 2 if index == 2 else layout.shape[1]
        visits.append(
            Observation(
                flux=flux[:, :end].astype(np.float32),
                variance=np.ones((layout.shape[0], end), dtype=np.float32),
                good=np.ones((layout.shape[0], end), dtype=bool),
                psf=varying_psfs(layout, sigma, sense),
                origin=(0, 0),
                name=f"visit {index}",
            )
        )
    return visits, noise


def test_gram_form_errs_by_less_than_a_hundredth_of_the_noise() -> None:
    """PSFs vary from cell to cell: the quadratic, linearised every 20 steps, against the visits themselves in
    every step, in a smooth sky that ends before the edges of the patch."""
    layout = CellLayout(3, 3, 34, 30)
    visits, noise = glow_visits(layout, height=3.0, width=10.0)
    data = PatchData(visits, layout, SIGMA, margin=12, dtype=torch.float64)
    sets = data.sets()
    images = []
    for refresh_every in (20, 1):
        u = torch.maximum(data.lower_median(sets), torch.tensor(0.1 * noise, dtype=data.dtype))
        for step in range(40):
            if step % refresh_every == 0:
                statistics = data.linearise(sets, u)
            u = maximum_likelihood_step(u, statistics)
        images.append(inner_smooth(u, SIGMA)[0, 12:-12, 12:-12])
    error = float((images[0] - images[1]).abs().max()) / noise
    assert 0.0 < error < 0.01


def test_solution_of_the_visits_is_a_fixed_point_of_the_gram_form() -> None:
    """On data that a sky with stars on the borders of cells predicts exactly, no step moves it."""
    layout = CellLayout(3, 3, 34, 30)
    visits, noise = glow_visits(layout, height=3.0, width=16.0)
    data = PatchData(visits, layout, SIGMA, margin=12, dtype=torch.float64)
    sky = torch.as_tensor(gaussian_stars(data.shape, [(42.0, 46.0, 2e3), (57.0, 64.0, 5e3)], 0.7))[None] + 0.1
    exact = []
    for index, visit in enumerate(visits):
        flux = data.visit(index).kernel.forward(sky[0])[12:-12, 12:-12].numpy()
        exact.append(dataclasses.replace(visit, flux=flux[:, : visit.flux.shape[1]]))
    exactly = data.with_observations(exact)
    statistics = exactly.linearise(exactly.sets(), sky)
    moved = sky
    for _ in range(20):
        moved = maximum_likelihood_step(moved, statistics)
    change = inner_smooth(moved - sky, SIGMA)[0, 12:-12, 12:-12]
    assert float(change.abs().max()) < 1e-6 * noise


def test_smooth_sky_has_no_step_at_the_borders_of_cells() -> None:
    """The error of the restored glow does not jump where one PSF takes over from the next."""
    layout = CellLayout(3, 3, 40, 36)
    height, width = 3.0, 16.0
    visits, noise = glow_visits(layout, height, width)
    data = PatchData(visits, layout, SIGMA, margin=16)
    image = inner_smooth(maximum_likelihood(data, data.sets()).latent, SIGMA)[0, 16:-16, 16:-16].numpy()
    y, x = np.mgrid[: layout.shape[0], : layout.shape[1]]
    broad = width**2 + SIGMA**2
    chi2 = ((y - 0.55 * layout.shape[0]) ** 2 + (x - 0.45 * layout.shape[1]) ** 2) / broad
    error = (image / noise - height * width**2 / broad * np.exp(-0.5 * chi2))[16:-16, 16:-16]
    for border in (40 - 16, 80 - 16):
        assert np.abs(error[border] - error[border - 1]).max() < 0.01
    for border in (36 - 16, 72 - 16):
        assert np.abs(error[:, border] - error[:, border - 1]).max() < 0.01


def test_sets_know_their_own_visits_only(data: PatchData) -> None:
    """Changing the data of a visit changes nothing in the statistics of a set without it."""
    members = some_members(data)
    models = torch.stack([some_model(data, 1), some_model(data, 2)])
    before = data.linearise(data.sets(members), models)
    observations = list(data.observations)
    spoiled = observations[1].flux + 1e3
    other = data.with_observations(
        [observations[0], dataclasses.replace(observations[1], flux=spoiled), *observations[2:]]
    )
    after = other.linearise(other.sets(members), models)
    for name in ("matched", "seen", "coverage", "coadd", "objective"):
        first, second = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert not torch.equal(before.matched[0], after.matched[0])
    first, second = data.lower_median(data.sets(members)), other.lower_median(other.sets(members))
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    assert not torch.equal(first[0], second[0])


def test_sets_of_a_wrong_number_of_groups_are_refused(data: PatchData) -> None:
    with pytest.raises(ValueError, match="made of 4 groups, but the visits have 5"):
        data.sets(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="4 visits cannot stand in for 5"):
        data.with_observations(data.observations[:4])


class OnDemand(Sequence[Observation]):
    """Visits that are made whenever they are asked for; counts them and those that are still alive."""

    def __init__(self, n_visits: int) -> None:
        self._sigmas = list(np.linspace(1.5, 2.2, n_visits))
        self.calls = 0
        self.most_alive = 0
        self._alive: weakref.WeakSet[Observation] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._sigmas)

    @property
    def n_alive(self) -> int:
        gc.collect()
        return len(self._alive)

    def __getitem__(self, index: int) -> Observation:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.calls += 1
        visit = observe(SMALL, [(9.0, 8.0, 500.0)], [self._sigmas[index]], seed=index, stamp=15)[0]
        self._alive.add(visit)
        self.most_alive = max(self.most_alive, len(self._alive))
        return visit


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def kept_bytes(visits: OnDemand) -> int:
    """Bytes of all tensors of the data, sets and loss of a fit after some of its steps."""
    before = tensor_bytes()
    data = PatchData(visits, SMALL, SIGMA, margin=5)
    loss = SplitLoss(data, *deal_splits(data.n_groups, 2, torch.Generator().manual_seed(1)), base_steps=1)
    sets = data.sets()
    net = make_trunk(1, data.device, data.dtype)
    loss.refresh(net)
    loss.backward(net, 1, 3)
    after = tensor_bytes()
    assert len(sets) == 1
    return after - before


def test_memory_does_not_depend_on_the_number_of_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit keeps of 12 and of 60 visits that are made on demand; no visit is kept."""
    one_kernel = 1 * 2 * 15 * 15 * 4
    monkeypatch.setattr(visit_kernels, "_KERNEL_CACHE_BYTES", 3 * one_kernel)
    monkeypatch.setattr(visit_kernels, "_OPERATOR_CACHE_BYTES", 0)
    kept = []
    for n_visits in (MAX_GROUPS, 5 * MAX_GROUPS):
        visits = OnDemand(n_visits)
        kept.append(kept_bytes(visits))
        assert visits.n_alive == 0
        assert visits.most_alive <= 2
    assert kept[0] == kept[1] > 0


def test_a_step_reads_no_visit() -> None:
    visits = OnDemand(14)
    data = PatchData(visits, SMALL, SIGMA, margin=5)
    loss = SplitLoss(data, *deal_splits(data.n_groups, 2, torch.Generator().manual_seed(1)), base_steps=1)
    net = make_trunk(1, data.device, data.dtype)
    before = visits.calls
    loss.refresh(net)
    assert visits.calls == before + 14
    loss.backward(net, 0, 0)
    loss.backward(net, 1, 5)
    assert visits.calls == before + 14


def test_weights_and_fractions_of_a_partial_visit(data: PatchData) -> None:
    assert data.weight.shape == (5, 2, 3)
    np.testing.assert_allclose(data.weight[:3], 1.0)
    np.testing.assert_allclose(data.weight[3], 0.5)
    np.testing.assert_allclose(data.weight[4], [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    # Visit 3 spans rows 7-39 and columns 11-44 of cells of 22 x 17 pixels.
    np.testing.assert_allclose(data.overlap[3, 0], [15 * 6 / 374, 15 * 17 / 374, 15 * 11 / 374])
    np.testing.assert_allclose(data.overlap[3, 1], [18 * 6 / 374, 18 * 17 / 374, 18 * 11 / 374])
    assert np.all(data.good_fraction <= data.overlap)


def test_a_pixel_moves_when_a_tenth_of_its_light_has_data() -> None:
    """A visit of a flat sky has no data within two and within more than five sigma of two pixels."""
    layout, sigma = CellLayout(1, 2, 60, 60), 2.0
    visit = observe(layout, [], [sigma])[0]
    visit.flux[...] = 20.0
    y, x = np.indices(layout.shape)
    for x0, radius in ((30, 2.0 * sigma), (90, 5.5 * sigma)):
        visit.good[np.hypot(y - 30, x - x0) < radius] = False
    data = PatchData([visit], layout, SIGMA, margin=8, huber_delta=1e9, dtype=torch.float64)
    latent = torch.full((1, *data.shape), 10.0, dtype=torch.float64)
    statistics = data.linearise(data.sets(), latent)
    part, unseen = (0, 38, 38), (0, 38, 98)
    assert float(statistics.coverage[part]) == pytest.approx(0.12, abs=0.05)
    moved = maximum_likelihood_step(latent, statistics)
    assert float(moved[part]) == pytest.approx(20.0)
    assert float(moved[unseen]) == 10.0


def test_lower_median_ignores_a_minority(data: PatchData) -> None:
    median = data.lower_median(data.sets(some_members(data)))
    assert float(median[:, 5 + 5 : 5 + 8, 5 + 7 : 5 + 12].max()) < 20.0


def test_lower_median_of_many_visits_ignores_a_minority_too() -> None:
    """Trails in every fifth of 40 visits, at the same place."""
    visits = observe(LAYOUT, [], [1.5 + 0.01 * index for index in range(40)], seed=5)
    for visit in visits[::5]:
        visit.flux[5:8, 7:30] += 500.0
    data = PatchData(visits, LAYOUT, SIGMA, margin=5)
    median = data.lower_median(data.sets())[0, 5:-5, 5:-5]
    assert float(median[5:8, 7:30].max()) < 2.0
    assert float(median[20:].mean().abs()) < 0.2


def test_visits_that_do_not_fit_are_refused() -> None:
    visits = observe(LAYOUT, [], [1.5])
    with pytest.raises(ValueError, match="has PSFs for"):
        PatchData(visits, CellLayout(1, 1, *LAYOUT.shape), SIGMA)
    with pytest.raises(ValueError, match="outside the patch"):
        PatchData([dataclasses.replace(visits[0], origin=(1, 0))], LAYOUT, SIGMA)
    nothing = dataclasses.replace(visits[0], good=np.zeros(LAYOUT.shape, dtype=bool))
    with pytest.raises(NothingToRestoreError, match="No visit"):
        PatchData([nothing], LAYOUT, SIGMA)
