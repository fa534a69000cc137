# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""How a quantum shares a node: the choice of a GPU, batches that get smaller, and the CPU as the last resort.

No GPU is needed: what torch says of GPUs, and memory that runs out, are simulated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from toy import observe

from lsst.coadd.deepprior import fit, restore
from lsst.coadd.deepprior.baselines import MaximumLikelihood
from lsst.coadd.deepprior.batches import Batches
from lsst.coadd.deepprior.devices import Gpu, choose_device, visible_gpus
from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.groups import deal_splits
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.patch_data import PatchData
from lsst.coadd.deepprior.statistics import VisitSets
from lsst.coadd.deepprior.tasks.deep_prior_coadd import DeepPriorCoaddTask
from lsst.coadd.deepprior.tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from lsst.coadd.deepprior.tasks.execution import gpu_peak_bytes
from lsst.coadd.deepprior.warps import Warp

GIB = 2**30
LAYOUT = CellLayout(2, 1, 20, 33)
SETTINGS = RestoreSettings(steps=4, base_steps=10, n_splits=6, refresh_every=2, n_variance_draws=1)


def gpus(*free_gib: float) -> list[Gpu]:
    return [Gpu(f"cuda:{k}", int(free * GIB), 80 * GIB) for k, free in enumerate(free_gib)]


@pytest.mark.parametrize(
    ("asked", "found", "number", "device"),
    [
        ("auto", gpus(), 7, "cpu"),
        ("cpu", gpus(79), 7, "cpu"),
        ("auto", gpus(3), 7, "cuda:0"),
        ("cuda", gpus(30, 78, 50), 7, "cuda:1"),
        ("auto", gpus(79, 20, 79.5), 7, "cuda:2"),
        ("auto", gpus(79, 20, 79.5), 8, "cuda:0"),
        ("auto", [Gpu("cuda:0", 20 * GIB, 80 * GIB), Gpu("cuda:1", 15 * GIB, 16 * GIB)], 1, "cuda:1"),
    ],
)
def test_choice(asked: str, found: list[Gpu], number: int, device: str) -> None:
    """The least used, and where several are, one by the number of the process."""
    assert choose_device(asked, found, number) == device


def test_peak_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {"cuda:1": 7}.__getitem__)
    assert gpu_peak_bytes("cuda:1") == 7
    assert gpu_peak_bytes("cpu") == 0


def test_absent_gpu_is_an_error_where_one_is_asked_for() -> None:
    with pytest.raises(
        RuntimeError, match="device 'cuda', but torch finds no GPU here; ask the batch system"
    ):
        choose_device("cuda", [], 1)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, free_gib: Sequence[float | None]) -> None:
    """Let torch find GPUs; `None` is one that is broken."""

    def memory(index: int) -> tuple[int, int]:
        free = free_gib[index]
        if free is None:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")
        return int(free * GIB), 80 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: len(free_gib) > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free_gib))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)


def test_gpu_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, [None, 70])
    messages: list[str] = []
    assert visible_gpus(messages.append) == [Gpu("cuda:1", 70 * GIB, 80 * GIB)]
    assert messages == [
        "GPU 0 does not answer and is left out: CUDA error: all CUDA-capable devices are busy or unavailable"
    ]


def test_gpu_of_the_slot_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, [])
    messages: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert visible_gpus(messages.append) == []
    assert messages == ["CUDA_VISIBLE_DEVICES is 3, but no GPU can be used here"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(messages.append) == []
    assert len(messages) == 1


def test_batches_are_halved_where_memory_runs_out() -> None:
    messages: list[str] = []
    batches = Batches(messages.append)
    tried = []

    def squares(some: slice) -> list[int]:
        tried.append(some.stop - some.start)
        if tried[-1] > 3:
            raise torch.OutOfMemoryError
        return [k * k for k in range(some.start, some.stop)]

    expected = [k * k for k in range(13)]
    assert [k for part in batches.map(squares, 13) for k in part] == expected
    assert tried == [13, 6, 3, 3, 3, 3, 1]
    assert messages == [
        "out of memory with 13 at once; going on with 6",
        "out of memory with 6 at once; going on with 3",
    ]
    tried.clear()
    assert [k for part in batches.map(squares, 13) for k in part] == expected
    assert tried == [3, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("error", "sizes"),
    [
        (torch.OutOfMemoryError(), [5, 2, 1]),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), [5, 2, 1]),
        (RuntimeError("cuFFT error: CUFFT_INVALID_SIZE"), [5]),
    ],
)
def test_one_that_does_not_fit_is_an_error(error: RuntimeError, sizes: list[int]) -> None:
    tried = []

    def never(some: slice) -> None:
        tried.append(some.stop - some.start)
        raise error

    with pytest.raises(type(error)):
        Batches().map(never, 5)
    assert tried == sizes


def test_fit_with_smaller_batches_is_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for two splits at a time."""
    visits = observe(LAYOUT, [(15.2, 12.7, 900.0)], list(np.linspace(1.5, 2.1, 6)), seed=1, stamp=15)
    expected = restore.restore(visits, LAYOUT, SETTINGS)
    likelihood = fit.maximum_likelihood

    def small_likelihood(data: PatchData, sets: VisitSets, *, steps: int) -> MaximumLikelihood:
        if len(sets) > 2:
            raise torch.OutOfMemoryError
        return likelihood(data, sets, steps=steps)

    monkeypatch.setattr(fit, "maximum_likelihood", small_likelihood)
    messages: list[str] = []
    result = restore.restore(visits, LAYOUT, SETTINGS, batches=Batches(messages.append))
    assert messages == [
        "out of memory with 6 at once; going on with 3",
        "out of memory with 3 at once; going on with 1",
    ]
    scale = float(np.abs(expected.image).max())
    np.testing.assert_allclose(result.image, expected.image, atol=1e-5 * scale)
    np.testing.assert_allclose(result.curves["held_out"], expected.curves["held_out"], rtol=1e-4)


def test_features_of_batches_are_those_of_all_at_once() -> None:
    visits = observe(LAYOUT, [(15.2, 12.7, 900.0)], list(np.linspace(1.5, 2.1, 6)), seed=1, stamp=15)
    data = PatchData(visits, LAYOUT, 0.9, margin=8)
    splits = deal_splits(6, 5, torch.Generator().manual_seed(1))
    net = fit.make_trunk(1, torch.device("cpu"), data.dtype)
    losses = []
    for limit in (None, 2):
        batches = Batches()
        batches._limit = limit
        loss = fit.SplitLoss(data, *splits, base_steps=10, batches=batches)
        objective = loss.refresh(net)
        loss.backward(net, 4, 3)
        losses.append((objective, net.exit.bias.grad.clone()))
        net.zero_grad()
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-7)


def task(**settings: object) -> DeepPriorCoaddTask:
    config = DeepPriorCoaddConfig()
    config.update(init="scratch", base_steps=10, steps=2, n_splits=2, n_variance_draws=1, **settings)
    return DeepPriorCoaddTask(config=config)


@pytest.mark.parametrize("cpu_fallback", [True, False])
def test_cpu_is_the_last_resort(
    warps: list[Warp],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cpu_fallback: bool,
) -> None:
    """The less used of two GPUs, with a budget; its memory does not suffice."""
    whole = restore.restore
    devices, budgets = [], []

    def without_memory(*args: object, device: str, **kwargs: object) -> object:
        devices.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        pretend_gpus(monkeypatch, [])  # torch asks them for random numbers
        return whole(*args, device=device, **kwargs)  # type: ignore[arg-type]

    pretend_gpus(monkeypatch, [20, 75])
    monkeypatch.setattr(restore, "restore", without_memory)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: budgets.append(args))
    one = task(gpu_memory_fraction=0.5, cpu_fallback=cpu_fallback)
    with caplog.at_level(logging.INFO):
        if not cpu_fallback:
            with pytest.raises(torch.OutOfMemoryError):
                one.run(warps=warps)
        else:
            result = one.run(warps=warps)
            assert result.coadd.metadata["device"] == "cpu"
            assert one.metadata["gpu_peak_bytes"] == 0
            assert "the memory of cuda:1 does not suffice; going on on the CPU (CUDA out of" in caplog.text
    assert "computing on cuda:1" in caplog.text
    assert devices == ["cuda:1", "cpu"][: 1 + cpu_fallback]
    assert budgets == [(0.5, "cuda:1")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees_with_itself_and_the_cpu(warps: list[Warp]) -> None:
    """Two runs, and the CPU: to a hundredth of the noise of the coadd in almost all pixels."""
    one, two, cpu = (task(device=device).run(warps=warps) for device in ("cuda", "cuda", "cpu"))
    noise = one.metrics["noise"]["coadd_sigma_nJy"]
    for other in (two, cpu):
        difference = np.abs(one.coadd.image.array - other.coadd.image.array)
        assert np.quantile(difference, 0.999) < 0.01 * noise
