# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Tests of the largest values in boxes, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from lsst.coadd.deepprior.box_maximum import box_maximum


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 7), (9, 5), (13, 31)])
def test_the_maximum_is_that_of_scipy(size: tuple[int, int]) -> None:
    images = np.random.default_rng(1).normal(size=(2, 23, 17)).astype(np.float32) - 5.0
    expected = scipy.ndimage.maximum_filter(images, (1, *size), mode="constant", cval=-np.inf)
    np.testing.assert_array_equal(box_maximum(torch.as_tensor(images), *size).numpy(), expected)


def test_a_missing_value_is_missing_in_all_boxes_that_hold_it() -> None:
    image = torch.zeros(11, 12)
    image[4, 7] = torch.nan
    missing = box_maximum(image, 3, 5).isnan()
    assert missing.sum() == 15
    assert bool(missing[3:6, 5:10].all())


@pytest.mark.parametrize("size", [(2, 3), (3, 4), (0, 1), (1, -1)])
def test_boxes_without_a_central_pixel_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="odd numbers of pixels"):
        box_maximum(torch.zeros(5, 5), *size)
