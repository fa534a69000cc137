# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsst.coadd.deepprior.groups import MAX_GROUPS, deal_groups, deal_splits, lower_median


def test_few_visits_are_a_group_each() -> None:
    group = deal_groups(np.array([1.0, 0.0, 3.0, 0.5]), np.array([4.0, np.nan, 3.0, 5.0]))
    np.testing.assert_array_equal(group, [0, -1, 1, 2])
    np.testing.assert_array_equal(deal_groups(np.ones(12), np.arange(12.0)), np.arange(12))


@pytest.mark.parametrize("n_visits", [13, 40, 180])
def test_groups_are_equally_deep_and_of_mixed_seeing(n_visits: int) -> None:
    rng = np.random.default_rng(n_visits)
    depth = rng.uniform(0.5, 1.5, n_visits)
    depth[3] = 0.0
    seeing = rng.uniform(3.0, 7.0, n_visits)
    seeing[3] = np.nan
    group = deal_groups(depth, seeing)
    assert group[3] == -1
    assert set(group[depth > 0.0]) == set(range(MAX_GROUPS))
    deep = np.array([depth[group == g].sum() for g in range(MAX_GROUPS)])
    # The groups differ by a visit at most.
    assert deep.max() - deep.min() <= depth.max()
    if n_visits == 180:
        mean = np.array(
            [np.average(seeing[group == g], weights=depth[group == g]) for g in range(MAX_GROUPS)]
        )
        assert np.ptp(mean) < 0.25
        shuffled = rng.permutation(group[group >= 0])
        chance = [seeing[group >= 0][shuffled == g].mean() for g in range(MAX_GROUPS)]
        assert np.ptp(mean) < 0.5 * np.ptp(chance)


def test_deep_visits_do_not_share_a_group() -> None:
    """Two visits as deep as all others together are not dealt into one group."""
    depth = np.full(20, 0.1)
    depth[[4, 15]] = 2.0
    group = deal_groups(depth, np.linspace(3.0, 5.0, 20), n_groups=4)
    assert group[4] != group[15]


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="0 groups"):
        deal_groups(np.ones(3), np.ones(3), n_groups=0)


@pytest.mark.parametrize("n_images", [1, 2, 3, 4, 5])
def test_lower_median_of_few_images_is_exact(n_images: int) -> None:
    rng = np.random.default_rng(n_images)
    images = rng.standard_normal((n_images, 7, 5))
    expected = np.sort(images, axis=0)[(n_images - 1) // 2]
    result = lower_median(torch.as_tensor(image) for image in images)
    np.testing.assert_array_equal(result.numpy(), expected)


def test_lower_median_leaves_out_what_has_no_value() -> None:
    images = torch.tensor([[[1.0, torch.nan, 5.0]], [[2.0, torch.nan, torch.nan]], [[9.0, torch.nan, 7.0]]])
    result = lower_median(images)
    assert result[0, 0] == 2.0
    assert result[0, 1].isnan()
    assert result[0, 2] == 5.0


@pytest.mark.parametrize("n_images", [1, 2, 3, 4, 5])
def test_lower_median_is_that_of_the_values_there_are(n_images: int) -> None:
    rng = np.random.default_rng(n_images)
    images = torch.as_tensor(rng.standard_normal((n_images, 31, 23)))
    images[torch.as_tensor(rng.random(images.shape) < 0.4)] = torch.nan
    expected = images.nanmedian(dim=0).values
    np.testing.assert_array_equal(lower_median(images).numpy(), expected.numpy())


@pytest.mark.parametrize("n_images", [5, 23, 60, 125])
def test_median_of_many_images_is_near_the_exact_one(n_images: int) -> None:
    rng = np.random.default_rng(n_images)
    images = rng.standard_normal((n_images, 60, 50)).astype(np.float32)
    result = lower_median(torch.as_tensor(image) for image in images).numpy()
    exact = np.median(images, axis=0)
    # The standard error of a median is 1.25 / sqrt(n); that of the remedian is larger by up to two thirds.
    error = 1.2533 / np.sqrt(n_images)
    assert result.std() < 1.7 * error
    # The lower of two middle values is too low by less than the standard error.
    assert np.abs(result.mean()) < error
    assert (result - exact).std() < 1.5 * error


@pytest.mark.parametrize(("n_images", "bias"), [(6, 0.1), (10, 1.1), (30, 0.1)])
def test_images_left_over_count_for_what_they_stand_for(n_images: int, bias: float) -> None:
    """One image after five, or five after 25, do not pull the median down; two fives give the lower one."""
    rng = np.random.default_rng(n_images)
    images = rng.standard_normal((n_images, 90, 70))
    images[:, 0, 0] = np.nan
    images[1:, 0, 1] = np.nan
    result = lower_median(torch.as_tensor(image) for image in images).numpy()
    exact = np.median(images, axis=0)
    assert np.isnan(result[0, 0])
    assert result[0, 1] == images[0, 0, 1]
    difference = (result - exact)[1:] * np.sqrt(n_images)
    assert np.abs(difference.mean()) < bias
    assert difference.std() < 1.2


def test_where_most_images_have_no_value_the_others_have_the_median() -> None:
    """Five images that stand for nothing, and one after them."""
    images = torch.full((6, 1, 2), torch.nan)
    images[5, 0, 0], images[2, 0, 1] = 3.0, 4.0
    assert lower_median(images).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("order", ["first", "last", "spread"])
def test_outliers_of_a_minority_do_not_enter_the_median(order: str) -> None:
    """A fifth of 50 images is bright everywhere, whatever their place in the stream."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((50, 12, 11)).astype(np.float32)
    bright = {"first": slice(0, 10), "last": slice(40, 50), "spread": slice(0, 50, 5)}[order]
    images[bright] += 1e4
    assert float(lower_median(torch.as_tensor(image) for image in images).max()) < 10.0


@pytest.mark.parametrize(
    ("n_visits", "n_loss"), [(2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (8, 3), (12, 4), (31, 10)]
)
def test_splits(n_visits: int, n_loss: int) -> None:
    encoder, loss = deal_splits(n_visits, 24, torch.Generator().manual_seed(1))
    assert not bool((encoder & loss).any())
    assert bool((encoder | loss).all())
    times = loss.sum(dim=0)
    assert int(times.max() - times.min()) <= 1
    if n_visits < 5:
        assert len(loss) == n_visits
    assert bool((loss.sum(dim=1) == n_loss).all())


def test_one_visit_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="two visits"):
        deal_splits(1, 8, torch.Generator())
