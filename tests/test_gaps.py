# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import math

import pytest
import torch

from lsst.coadd.deepprior.gaps import between_samples, filled_from_neighbours


@pytest.mark.parametrize("step", [2, 3])
def test_a_plane_is_interpolated_as_it_is(step: int) -> None:
    """A plane of unequal slopes, known at the centres of the pixels of a visit."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(36.0), indexing="ij")
    first = (step - 1) // 2
    known = torch.full((1, 24, 36), math.nan)
    beyond = 0.5 * (step % 2 == 0)
    plane = 5.0 + 2.0 * y - 0.7 * x
    sampled = 5.0 + 2.0 * (y + beyond) - 0.7 * (x + beyond)
    known[0, first::step, first::step] = sampled[first::step, first::step]
    inner = (0, slice(step, -step), slice(step, -step))
    torch.testing.assert_close(between_samples(known, step)[inner], plane[inner[1:]])


def test_a_missing_sample_takes_nothing_else_with_it() -> None:
    """Where all samples around are missing there is no value; where one is there, it is taken."""
    known = torch.full((2, 16, 20), math.nan)
    known[0, 7, 10] = 4.0
    found = between_samples(known, 3)
    assert found[0, 7, 10] == 4.0
    assert found[0].isfinite().sum() == 25
    assert (found[0, 5:10, 8:13] == 4.0).all()
    assert found[1].isnan().all()


def test_gaps_fall_off_from_the_brightest_neighbour_up_to_the_reach() -> None:
    """A gap beside a value of 16 and one of 8: three quarters of the larger, and of that for the next rim."""
    image = torch.full((1, 3, 7), math.nan)
    image[0, :, 0], image[0, 1, 4] = 8.0, 16.0
    filled = filled_from_neighbours(image, 2)
    torch.testing.assert_close(
        filled[0],
        torch.tensor([[8.0, 6.0, 9.0, 12.0, 12.0, 12.0, 9.0]])
        .repeat(3, 1)
        .index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(16.0)),
    )
    assert filled_from_neighbours(image, 1).isnan().sum() == 6
    whole = torch.arange(21.0).reshape(1, 3, 7)
    torch.testing.assert_close(filled_from_neighbours(whole, 5), whole)
