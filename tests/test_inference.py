# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Inference tile by tile, and the half-precision path of GPUs on the CPU."""

from __future__ import annotations

import pytest
import torch

from lsst.coadd.deepprior import network
from lsst.coadd.deepprior.network import FEATURES, Trunk


def trunk(widths: tuple[int, ...] = (8, 12, 16)) -> Trunk:
    """Return a network with random weights, also in the last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Trunk(widths)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def channels(ny: int, nx: int) -> torch.Tensor:
    return torch.randn(len(FEATURES), ny, nx, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("shift", [(0, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("widths", [(8, 12, 16), (8, 12), (8,)])
@pytest.mark.parametrize("size", [64, 128])
def test_tiles_leave_no_seam(
    shift: tuple[int, int], widths: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, image = trunk(widths), channels(197, 270)
    dy, dx = shift
    padded = torch.nn.functional.pad(image[None], (dx, 0, dy, 0), mode="replicate")
    with torch.no_grad():
        whole = net(padded)[0, dy:, dx:]
        monkeypatch.setitem(network._TILE, "cpu", size)
        tiles = net.tile_by_tile(image, dy, dx)
    torch.testing.assert_close(tiles, whole, rtol=1e-4, atol=1e-4)


def test_half_precision_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: bfloat16 has 8 bits, and the result is float32."""
    net, image = trunk(), channels(61, 80)
    with torch.no_grad():
        full = net.tile_by_tile(image, 1, 0)
        monkeypatch.setattr(network, "_HALF", ("cpu",))
        half = net.tile_by_tile(image, 1, 0)
    assert half.dtype == torch.float32
    assert 0.0 < float((half - full).norm() / full.norm()) < 0.03
