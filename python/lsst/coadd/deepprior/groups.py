# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Groups of visits, the splits that are made of them, and the median of a stream of visits."""

from __future__ import annotations

__all__ = ("MAX_GROUPS", "deal_groups", "deal_splits", "lower_median", "median_of")

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .parallel import by_rows

MAX_GROUPS = 12
"""Largest number of groups that the visits of a patch are dealt into."""

_MEDIAN_BUFFER = 5
"""Number of images whose median is taken at once where a median of many is approximated."""


def lower_median(images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the pixel-wise lower median of a stream of images without keeping them all.

    Up to `_MEDIAN_BUFFER` images it is exact, beyond it is the remedian, the median of medians (Rousseeuw &
    Bassett 1990, JASA 85, 97), in which what is left over at the end counts for as many images as it stands
    for.

    Parameters
    ----------
    images : `~collections.abc.Iterable` [`torch.Tensor`], (y, x)
        At least one image; NaN where it has no value.

    Returns
    -------
    median : `torch.Tensor`, (y, x)
        NaN where no image has a value.
    """
    levels: list[list[torch.Tensor]] = [[]]
    for image in images:
        levels[0].append(image)
        for level, kept in enumerate(levels):
            if len(kept) < _MEDIAN_BUFFER:
                break
            if level + 1 == len(levels):
                levels.append([])
            levels[level + 1].append(median_of(kept))
            kept.clear()
    weights = [_MEDIAN_BUFFER**level for level, kept in enumerate(levels) for _ in kept]
    return median_of([image for kept in levels for image in kept], weights)


def median_of(images: Sequence[torch.Tensor], weights: Sequence[int] = ()) -> torch.Tensor:
    """Return the pixel-wise lower median of some images.

    Parameters
    ----------
    images : `~collections.abc.Sequence` [`torch.Tensor`], (y, x)
        At least one image; NaN where it has no value.
    weights : `~collections.abc.Sequence` [`int`], optional
        How many times each image counts; without them, or with equal ones, once.

    Returns
    -------
    median : `torch.Tensor`, (y, x)
        NaN where no image has a value.
    """
    median = torch.empty_like(images[0])

    def find(out: torch.Tensor, *rows: torch.Tensor) -> None:
        some = _lower_median(rows) if len(set(weights)) < 2 else _weighted_lower_median(rows, weights)
        out.copy_(some)

    by_rows(find, median, *images)
    return median


def _lower_median(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the lower median by an odd-even transposition sort of images, all pixels at a time."""
    missing = [image.isnan() for image in images]
    number = len(images) - torch.stack(missing).sum(dim=0, dtype=torch.int16)
    ranked = [torch.where(none, torch.inf, image) for none, image in zip(missing, images, strict=True)]
    for turn in range(len(ranked)):
        for k in range(turn % 2, len(ranked) - 1, 2):
            low, high = ranked[k : k + 2]
            ranked[k : k + 2] = torch.minimum(low, high), torch.maximum(low, high)
    median = torch.where(number > 0, ranked[0], torch.nan)
    for k in range(1, (len(ranked) + 1) // 2):
        median = torch.where(number > 2 * k, ranked[k], median)
    return median


def _weighted_lower_median(images: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """Return the least value of each pixel up to which the images have half of the weight."""
    values, order = torch.stack(list(images)).sort(dim=0)  # NaN last
    weight = torch.as_tensor(weights, dtype=values.dtype, device=values.device)[order]
    weight = torch.where(values.isnan(), 0.0, weight)
    below = weight.cumsum(dim=0) < 0.5 * weight.sum(dim=0)
    return values.gather(0, below.sum(dim=0, keepdim=True))[0]


def deal_groups(depth: np.ndarray, seeing: np.ndarray, n_groups: int = MAX_GROUPS) -> np.ndarray:
    """Deal visits into groups of about equal depth and mixed seeing.

    From the sharpest to the most blurred, each visit goes to the group that is shallowest so far.

    Parameters
    ----------
    depth : `numpy.ndarray`, (visit,)
        Inverse variance of every visit; those of 0 get no group.
    seeing : `numpy.ndarray`, (visit,)
        FWHM of their PSFs.
    n_groups : `int`, optional
        Largest number of groups; fewer visits are a group each.

    Returns
    -------
    group : `numpy.ndarray`, (visit,), int
        Group of every visit, -1 where it has none.
    """
    if n_groups < 1:
        raise ValueError(f"Visits cannot be dealt into {n_groups} groups.")
    group = np.full(len(depth), -1)
    usable = np.flatnonzero(depth > 0.0)
    if len(usable) <= n_groups:
        group[usable] = np.arange(len(usable))
        return group
    total = np.zeros(n_groups)
    for visit in usable[np.argsort(seeing[usable], kind="stable")]:
        group[visit] = np.argmin(total)
        total[group[visit]] += depth[visit]
    return group


def deal_splits(
    n_groups: int, n_splits: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal groups of visits to the two sides of several splits, one for the encoder and one for the loss.

    Every third group is left out for the loss (at least one), such that all are left out equally often; two
    to four groups give every leave-one-out split.

    Parameters
    ----------
    n_groups : `int`
        Number of groups, at least 2.
    n_splits : `int`
        Number of splits wanted.
    generator : `torch.Generator`
        Source of random numbers.

    Returns
    -------
    encoder, loss : `torch.Tensor`, (split, group), bool
        The two sides of every split; they share no group.
    """
    if n_groups < 2:
        raise ValueError("A split needs at least two visits.")
    n_loss = 1 if n_groups < 5 else round(n_groups / 3)
    if n_groups < 5:
        n_splits = n_groups
    loss = torch.zeros(n_splits, n_groups, dtype=torch.bool)
    times = torch.zeros(n_groups)
    for split in range(n_splits):
        order = torch.argsort(times + 0.5 * torch.rand(n_groups, generator=generator))
        loss[split, order[:n_loss]] = True
        times += loss[split]
    return ~loss, loss
