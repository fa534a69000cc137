# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Least squares for the corrections of visits against dense algebra, with four parameters before the PSF."""

from __future__ import annotations

import numpy as np
import pytest

from lsst.coadd.deepprior.psf_basis import BACKGROUND
from lsst.coadd.deepprior.psf_equations import VisitEquations, solve_equations

N, N_PIXELS = 7, 60


def designs(rng: np.random.Generator, n_visits: int, scale: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return designs X and R of visits, (pixel, parameter)."""
    return [
        (scale * rng.normal(size=(N_PIXELS, N)), scale * rng.normal(size=(N_PIXELS, N)))
        for _ in range(n_visits)
    ]


def equations(x: np.ndarray, r: np.ndarray, residual: np.ndarray) -> VisitEquations:
    return VisitEquations(x.T @ x, x.T @ r, r.T @ r, x.T @ residual, r.T @ residual)


@pytest.mark.parametrize("anchored", [True, False])
def test_visits_and_a_common_change_are_told_apart(anchored: bool) -> None:
    """The data X a - R b of three visits give a, but for means that nothing tells; a fourth has no pixel."""
    rng = np.random.default_rng(1)
    own, common = rng.normal(size=(3, N)), rng.normal(size=N)
    some: list[VisitEquations | None] = [
        equations(x, r, x @ a - r @ common) for (x, r), a in zip(designs(rng, 3, 100.0), own, strict=True)
    ]
    some.insert(1, None)
    step, _, _ = solve_equations(some, np.zeros((4, N)), np.full(N, 100.0), anchored)
    expected = own - own.mean(axis=0)
    if anchored:
        expected[:, BACKGROUND + 1 :] = own[:, BACKGROUND + 1 :]
    np.testing.assert_allclose(step[[0, 2, 3]], expected, atol=1e-3)
    np.testing.assert_array_equal(step[1], 0.0)


def test_covariance_before_the_prior_is_learned_is_that_of_all_parameters() -> None:
    rng = np.random.default_rng(2)
    start = np.array([3.0, 2.0, 2.0, 0.0, 0.3, 0.2, 0.1])
    precision = np.zeros(N)
    precision[start > 0.0] = start[start > 0.0] ** -2.0
    pairs = designs(rng, 2, 1.0)
    dense = np.zeros((3 * N, 3 * N))
    for k, (x, r) in enumerate(pairs):
        place = slice(k * N, k * N + N)
        dense[place, place] = x.T @ x + np.diag(precision)
        dense[place, 2 * N :] = -x.T @ r
        dense[2 * N :, place] = -r.T @ x
        dense[2 * N :, 2 * N :] += r.T @ r
    expected = np.linalg.inv(dense)
    some = [equations(x, r, rng.normal(size=N_PIXELS)) for x, r in pairs]
    _, _, unlearned = solve_equations(some, np.zeros((2, N)), start, True)
    for k in range(2):
        block = expected[k * N : k * N + N, k * N : k * N + N]
        np.testing.assert_allclose(unlearned[k], block, rtol=1e-4, atol=1e-6)


def test_prior_is_learned_to_the_end() -> None:
    """Where nothing is to be corrected, what is known in the end is far more than a visit itself tells."""
    some = [VisitEquations(np.eye(N), *(np.zeros((N, N)),) * 2, *(np.zeros(N),) * 2) for _ in range(3)]
    _, covariance, unlearned = solve_equations(some, np.zeros((3, N)), np.full(N, 10.0), True)
    own = np.sqrt(np.diagonal(unlearned, axis1=1, axis2=2))
    np.testing.assert_allclose(own, 1.0, rtol=0.01)
    assert np.sqrt(np.diagonal(covariance, axis1=1, axis2=2)).max() < 0.15


def test_prior_is_learned_from_what_the_visits_have_in_all() -> None:
    """With equal errors, the width of the prior is that at which corrections and errors make up for it."""
    rng = np.random.default_rng(3)
    truth, error = 0.2, 0.1
    n_visits = 400
    measured = rng.normal(0.0, np.hypot(truth, error), n_visits)
    none = np.zeros((N, N))
    some = [
        VisitEquations(np.eye(N) / error**2, none, none, np.full(N, value) / error**2, np.zeros(N))
        for value in measured
    ]
    step, covariance, _ = solve_equations(some, np.zeros((n_visits, N)), np.full(N, 1.0), True)
    width = np.sqrt(np.mean(measured**2) - error**2)
    shrunk = width**2 / (width**2 + error**2)
    np.testing.assert_allclose(step[:, -1], shrunk * measured, atol=0.02 * error)
    np.testing.assert_allclose(covariance[:, -1, -1], shrunk * error**2, rtol=0.02)
    # What was corrected before counts for the prior: in all it is the same.
    before = np.zeros((n_visits, N))
    before[:, -1] = 0.5 * measured
    rest = [
        one._replace(own_right=one.own_right - one.own @ was) for one, was in zip(some, before, strict=True)
    ]
    again, _, _ = solve_equations(rest, before, np.full(N, 1.0), True)
    np.testing.assert_allclose((before + again)[:, -1], step[:, -1], atol=0.02 * error)


def test_without_stars_what_is_hardly_told_is_left() -> None:
    """The last parameter is known to 0.7 of what it may be, the one before to 0.1 of it."""
    rng = np.random.default_rng(4)
    own = np.eye(N) * 1e4
    own[-1, -1] = 1.0
    none = np.zeros((N, N))
    truth = rng.normal(size=(5, N))
    some = [VisitEquations(own, none, none, own @ one, np.zeros(N)) for one in truth]
    step, _, _ = solve_equations(some, np.zeros((5, N)), np.full(N, 1.0), False)
    np.testing.assert_allclose(step[:, -1], 0.0, atol=1e-6)
    np.testing.assert_allclose(step[:, :-1], (truth - truth.mean(axis=0))[:, :-1], atol=0.01)
    anchored, _, _ = solve_equations(some, np.zeros((5, N)), np.full(N, 1.0), True)
    assert np.abs(anchored[:, -1]).min() > 1e-3
