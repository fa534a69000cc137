# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Transforms that visits share change nothing, whatever cells and PSFs they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsst.coadd.deepprior.operators import CellConvolution, CellLayout
from lsst.coadd.deepprior.shared_spectra import AdjointSum, ModelSpectra

LAYOUT, MARGIN = CellLayout(3, 2, 21, 34), 5


def operators() -> list[CellConvolution]:
    """Return operators of several tilings, that see all cells, some cells and others, in mixed order."""
    generator = torch.Generator().manual_seed(2)
    used = [np.zeros((3, 2), dtype=bool) for _ in range(2)]
    used[0][0, 0] = used[1][2, 1] = used[1][1, 1] = True
    result = []
    for width, cells, constant in (
        (7, used[0], False),
        (7, None, False),
        (7, None, True),
        (7, used[1], False),
        (11, None, False),
        (7, None, True),
        (11, used[1], False),
    ):
        kernels = torch.rand(3, 2, width, width, generator=generator, dtype=torch.float64)
        if constant:
            kernels = kernels[:1, :1].expand(3, 2, -1, -1)
        result.append(CellConvolution(kernels, LAYOUT, MARGIN, cells))
    return result


def images(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number, *LAYOUT.canvas_shape(MARGIN), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n_sets", [1, 3])
def test_a_model_is_seen_as_by_each_operator_alone(n_sets: int) -> None:
    models = images(n_sets)
    spectra = ModelSpectra(models)
    for kernel in operators():
        torch.testing.assert_close(spectra.seen_by(kernel), kernel.forward(models), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_sets", [1, 3])
def test_the_sum_is_that_of_all_adjoints(n_sets: int) -> None:
    """Sets get what is theirs, and what is added behind the sum is added."""
    total = AdjointSum(images(n_sets))
    expected = torch.zeros_like(images(n_sets))
    chosen = torch.tensor([0, n_sets - 1]).unique()
    for number, kernel in enumerate(operators(), start=1):
        image = images(number)[-1:].expand(len(chosen), -1, -1)
        total.add(kernel, chosen, image)
        expected[chosen] += kernel.adjoint(image)
        if number == 3:
            torch.testing.assert_close(total.total(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total.total(), expected, rtol=1e-10, atol=1e-10)
    assert float(expected.abs().max()) > 1.0


@pytest.mark.parametrize("name", ["spectra", "adjoint_of"])
def test_one_tiling_is_transformed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model before the first visit, and the sum behind the last."""
    original, calls = getattr(CellConvolution, name), []

    def counted(self: CellConvolution, *args: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return original(self, *args)

    monkeypatch.setattr(CellConvolution, name, counted)
    model, (first, second) = images(1), operators()[:2]
    spectra, total = ModelSpectra(model), AdjointSum(model)
    for kernel in (first, second, first):
        total.add(kernel, torch.tensor([0]), spectra.seen_by(kernel))
    total.total()
    assert len(calls) == 1
