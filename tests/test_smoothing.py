# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from lsst.coadd.deepprior import parallel
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.smoothing import gaussian_smooth, separably_smooth


@pytest.mark.parametrize("block", [2**17, 150])
def test_smoothing_is_that_of_scipy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in many, of several images of unequal sides."""
    monkeypatch.setattr(parallel, "_BLOCK_PIXELS", block)
    images = np.random.default_rng(5).normal(size=(2, 31, 47))
    expected = np.stack(
        [
            scipy.ndimage.convolve(image, gaussian_stamp(1.7), mode="constant", output=np.float64)
            for image in images
        ]
    )
    smooth = gaussian_smooth(torch.as_tensor(images), 1.7).numpy()
    np.testing.assert_allclose(smooth, expected, atol=1e-12)


@pytest.mark.parametrize("step", [2, 4])
def test_values_apart(step: int) -> None:
    """A dilated profile is the same with zeros in between."""
    image = torch.randn(19, 26, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dilated = np.zeros(4 * step + 1)
    dilated[::step] = 1.0, 2.0, 5.0, 2.0, 1.0
    expected = scipy.ndimage.convolve(image.numpy(), np.outer(dilated, dilated), mode="constant")
    smooth = separably_smooth(image, [1.0, 2.0, 5.0, 2.0, 1.0], step)
    np.testing.assert_allclose(smooth.numpy(), expected, atol=1e-12)


def test_profiles_wider_than_the_image() -> None:
    image = torch.zeros(3, 40, dtype=torch.float64)
    image[2, 7] = 2.0
    smooth = separably_smooth(image, [1.0, 2.0, 3.0, 5.0, 3.0, 2.0, 1.0])
    assert smooth[:, 7].tolist() == [2.0 * 5.0 * 2.0, 2.0 * 5.0 * 3.0, 2.0 * 5.0 * 5.0]
    assert smooth[2, 3:12].tolist() == [0.0, 10.0, 20.0, 30.0, 50.0, 30.0, 20.0, 10.0, 0.0]
    assert not bool(smooth[:, :4].any() or smooth[:, 11:].any())
