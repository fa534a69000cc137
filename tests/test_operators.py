# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
import torch
from toy import observe

from lsst.coadd.deepprior import operators
from lsst.coadd.deepprior.operators import CellConvolution, CellLayout, gram_kernels
from lsst.coadd.deepprior.patch_data import PatchData

# Rows, columns, height, width, margin, kernel size: halos of 3, 4, 5, 2, 0, 6 and 7 pixels, also wider than
# the cells, cells of one pixel in one direction, and margins wider and narrower than cell and halo.
GEOMETRIES = [
    (3, 2, 20, 31, 6, 7),
    (1, 1, 17, 40, 5, 9),
    (2, 3, 9, 8, 16, 11),
    (2, 2, 10, 12, 0, 5),
    (1, 4, 7, 9, 3, 1),
    (5, 4, 3, 4, 8, 13),
    (4, 2, 1, 6, 2, 15),
]


def test_memory_that_torch_holds_unused_takes_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with 1 GB free beside 3 GB of which torch uses one, as with 3 GB free beside that one."""
    image = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 4)
    at_once = []
    for free, reserved in ((10**9, 3 * 10**9), (3 * 10**9, 10**9)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**10))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
        at_once.append(operators._tiles_at_once(10**4, image))
    assert at_once[0] == at_once[1] > 1000


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adjoint(geometry: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """<K u, y> = <u, K^T y>, also for a batch of operators."""
    n_i, n_j, height, width, margin, k = geometry
    generator = torch.Generator().manual_seed(3)
    layout = CellLayout(n_i, n_j, height, width)
    operator = CellConvolution(
        torch.rand(2, n_i, n_j, k, k, generator=generator, dtype=dtype), layout, margin
    )
    u = torch.randn(2, *layout.canvas_shape(margin), generator=generator, dtype=dtype)
    y = torch.randn(2, *layout.canvas_shape(margin), generator=generator, dtype=dtype)
    forward, adjoint = operator.forward(u), operator.adjoint(y)
    assert forward.dtype == adjoint.dtype == dtype
    difference = (forward * y).sum() - (u * adjoint).sum()
    assert abs(float(difference)) < tolerance * float(forward.norm() * y.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("geometry", [(2, 3, 5, 4, 3, 5), (3, 2, 2, 3, 2, 7), (2, 2, 4, 3, 0, 3)])
def test_adjoint_is_the_transposed_matrix(
    geometry: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Every element, from the responses to all single pixels; every row of windows adds up to one."""
    n_i, n_j, height, width, margin, k = geometry
    layout = CellLayout(n_i, n_j, height, width)
    kernels = torch.rand(n_i, n_j, k, k, generator=torch.Generator().manual_seed(8), dtype=dtype)
    operator = CellConvolution(kernels / kernels.sum(dim=(-2, -1), keepdim=True), layout, margin)
    shape = layout.canvas_shape(margin)
    n_pixels = shape[0] * shape[1]
    pixels = torch.eye(n_pixels, dtype=dtype).reshape(n_pixels, *shape)
    columns = operator.forward(pixels).reshape(n_pixels, n_pixels)
    rows = operator.adjoint(pixels).reshape(n_pixels, n_pixels)
    assert float((columns - rows.T).abs().max()) < tolerance * float(columns.abs().max())
    halo = k // 2
    inner = operator.forward(torch.ones(shape, dtype=dtype))[halo:-halo, halo:-halo]
    torch.testing.assert_close(inner, torch.ones_like(inner))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adjoint_with_missing_cells(dtype: torch.dtype, tolerance: float) -> None:
    """A visit that has no PSF in some cells, and no pixel in others, of a patch with PSFs that vary."""
    layout = CellLayout(3, 2, 11, 14)
    visit = observe(layout, [(9.0, 12.0, 500.0)], [1.6], seed=3, masked_fraction=0.1)[0]
    visit.psf[1, 1] = observe(layout, [], [2.1])[0].psf[0, 0]
    visit.psf[0, 1] = visit.psf[2, 0] = np.nan
    visit.good[11:22, :14] = False
    tensors = PatchData([visit], layout, 0.9, margin=7, dtype=dtype).visit(0)
    weight = tensors.weight[7:-7, 7:-7]
    assert not bool(weight[:11, 14:].any() or weight[22:, :14].any() or weight[11:22, :14].any())
    assert bool(weight[11:22, 14:].any())
    generator = torch.Generator().manual_seed(9)
    u, y = (torch.randn(layout.canvas_shape(7), generator=generator, dtype=dtype) for _ in range(2))
    forward, adjoint = tensors.kernel.forward(u), tensors.kernel.adjoint(y)
    difference = (forward * y).sum() - (u * adjoint).sum()
    assert abs(float(difference)) < tolerance * float(forward.norm() * y.norm())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equal_kernels_are_a_plain_convolution_without_seams(geometry: tuple[int, ...]) -> None:
    n_i, n_j, height, width, margin, k = geometry
    generator = torch.Generator().manual_seed(4)
    layout = CellLayout(n_i, n_j, height, width)
    kernel = torch.rand(k, k, generator=generator, dtype=torch.float64)
    u = torch.randn(layout.canvas_shape(margin), generator=generator, dtype=torch.float64)
    expected = torch.as_tensor(scipy.signal.convolve2d(u.numpy(), kernel.numpy(), mode="same"))
    kernels = kernel.repeat(n_i, n_j, 1, 1)
    torch.testing.assert_close(CellConvolution(kernels, layout, margin).forward(u), expected)
    # One cell a hair apart keeps the operator from taking the canvas as a single tile.
    kernels[-1, -1] *= 1.0 + 1e-9
    torch.testing.assert_close(
        CellConvolution(kernels, layout, margin).forward(u), expected, rtol=1e-7, atol=1e-7
    )


def test_each_cell_has_its_own_kernel() -> None:
    """Far from the borders a cell is convolved with its own kernel: rows and columns are not swapped."""
    layout, margin = CellLayout(2, 3, 30, 24), 4
    kernels = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            kernels[i, j, i, j] = 1.0 + i + 10 * j
    u = torch.zeros(layout.canvas_shape(margin), dtype=torch.float64)
    result = CellConvolution(kernels, layout, margin)
    for i in range(2):
        for j in range(3):
            y, x = margin + 30 * i + 15, margin + 24 * j + 12
            u.zero_()
            u[y, x] = 1.0
            image = result.forward(u)
            assert image[y + i - 2, x + j - 2] == pytest.approx(1.0 + i + 10 * j)
            assert float(image.sum()) == pytest.approx(1.0 + i + 10 * j)


@pytest.mark.parametrize(("margin", "size", "half"), [(6, 20, 6), (16, 9, 4), (0, 10, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_kernels_cross_over_as_raised_cosines(margin: int, size: int, half: int, axis: int) -> None:
    """Within the margin of a border, and no further than the middle of a cell."""
    layout = CellLayout(*((2, 1, size, 7) if axis == 0 else (1, 2, 7, size)))
    kernels = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(layout.n_i, layout.n_j, 1, 1)
    ones = torch.ones(layout.canvas_shape(margin), dtype=torch.float64)
    image = CellConvolution(kernels, layout, margin).forward(ones)
    distance = np.arange(2 * (size + margin)) + 0.5 - margin - size
    with np.errstate(divide="ignore"):
        expected = 2.0 + np.sin(0.5 * np.pi * np.clip(distance / half, -1.0, 1.0))
    across = image.numpy() if axis == 0 else image.numpy().T
    np.testing.assert_allclose(across, np.tile(expected, (across.shape[1], 1)).T, atol=1e-12)


def test_select_one_operator_of_a_batch() -> None:
    layout = CellLayout(2, 1, 9, 14)
    kernels = torch.rand(3, 2, 1, 5, 5, generator=torch.Generator().manual_seed(5))
    u = torch.rand(layout.canvas_shape(2), generator=torch.Generator().manual_seed(6))
    batch = CellConvolution(kernels, layout, 2)
    torch.testing.assert_close(batch[1].forward(u), CellConvolution(kernels[1], layout, 2).forward(u))
    torch.testing.assert_close(batch.forward(u)[2], batch[2].forward(u))


def test_gram_kernels_are_autocorrelations() -> None:
    kernel = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for one, gram in zip(kernel, gram_kernels(kernel), strict=True):
        expected = scipy.signal.correlate2d(one.numpy(), one.numpy(), mode="full")
        torch.testing.assert_close(gram, torch.as_tensor(expected))


def test_bad_input_is_refused() -> None:
    layout = CellLayout(2, 2, 10, 10)
    with pytest.raises(ValueError, match="odd-sized"):
        CellConvolution(torch.ones(2, 2, 4, 4), layout, 2)
    with pytest.raises(ValueError, match="do not end in"):
        CellConvolution(torch.ones(2, 3, 5, 5), layout, 2)
    with pytest.raises(ValueError, match="finite"):
        CellConvolution(torch.full((2, 2, 5, 5), torch.nan), layout, 2)
    with pytest.raises(ValueError, match="canvas"):
        CellConvolution(torch.ones(2, 2, 5, 5), layout, 2).forward(torch.ones(20, 20))
    with pytest.raises(ValueError, match="at least one"):
        CellLayout(0, 1, 10, 10)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiles that overlap are added up in the same order on any number of threads."""
    layout = CellLayout(5, 4, 13, 11)
    generator = torch.Generator().manual_seed(11)
    operator = CellConvolution(torch.rand(5, 4, 9, 9, generator=generator), layout, 6)
    u = torch.rand(2, *operator.shape, generator=generator)
    monkeypatch.setattr(operators, "_tiles_at_once", lambda n_pixels, like: 2)
    results = []
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3, 3):
            torch.set_num_threads(n_threads)
            results.append((operator.forward(u), operator.adjoint(u)))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for one, three, again in zip(*results, strict=True):
        assert torch.equal(three, again)
        torch.testing.assert_close(one, three, rtol=1e-6, atol=1e-6)


def test_blocks_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile at a time, and several rows of tiles at once as on a GPU."""
    layout = CellLayout(4, 3, 12, 9)
    generator = torch.Generator().manual_seed(12)
    kernels = torch.rand(4, 3, 7, 7, generator=generator, dtype=torch.float64)
    u = torch.rand(layout.canvas_shape(5), generator=generator, dtype=torch.float64)
    operator = CellConvolution(kernels, layout, 5)
    expected = operator.forward(u), operator.adjoint(u)
    for at_once in (1, 2, 6, 100):
        monkeypatch.setattr(operators, "_tiles_at_once", lambda n_pixels, like, at_once=at_once: at_once)
        torch.testing.assert_close(operator.forward(u), expected[0])
        torch.testing.assert_close(operator.adjoint(u), expected[1])


def test_cells_that_are_not_used_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Used cells get what they get of the whole, and give it back."""
    layout, margin = CellLayout(4, 5, 14, 12), 5
    generator = torch.Generator().manual_seed(13)
    kernels = torch.rand(4, 5, 7, 7, generator=generator, dtype=torch.float64)
    used = np.zeros((4, 5), dtype=bool)
    used[1, 1] = used[3, 4] = True
    weight = torch.zeros(layout.canvas_shape(margin), dtype=torch.float64)
    weight[margin + 14 : margin + 28, margin + 12 : margin + 24] = 1.0
    weight[margin + 42 : margin + 56, margin + 48 : margin + 60] = 1.0
    u, y = torch.rand(2, *weight.shape, generator=generator, dtype=torch.float64)
    whole, part = CellConvolution(kernels, layout, margin), CellConvolution(kernels, layout, margin, used)
    torch.testing.assert_close(part.forward(u) * weight, whole.forward(u) * weight)
    torch.testing.assert_close(part.adjoint(y * weight), whole.adjoint(y * weight))
    monkeypatch.setattr(operators, "_tiles_at_once", lambda n_pixels, like: 1)
    torch.testing.assert_close(part.forward(u) * weight, whole.forward(u) * weight)
    corner = np.s_[: margin + 7, -margin - 6 :]
    assert not bool(part.forward(u)[corner].any())
    assert bool(whole.forward(u)[corner].all())
