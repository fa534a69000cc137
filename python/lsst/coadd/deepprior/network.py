# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The deep prior: features of a set of visits, the encoder/decoder that corrects the base, its stretch."""

from __future__ import annotations

__all__ = ("FEATURES", "Features", "Trunk", "encoder_features", "latent_and_slope")

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional
from torch import nn

from .baselines import MaximumLikelihood
from .box_maximum import box_maximum
from .parallel import in_parallel
from .statistics import VisitSets

FEATURES = ("coadd", "matched", "first", "early", "base", "residual")
"""Names of the channels that the network reads, in this order."""

_SIGNAL = 10.0
"""Signal to noise ratio of a pixel of the early image above which it may be called bright."""

_UNRESOLVED = 3.0
"""Significance of what some steps leave of the data above which a bright pixel takes the image of more."""

_NEIGHBOURHOOD = 7
"""Width in pixels of the box in which that significance is gathered, about the size of a star."""

_LATENT_RANGE = (-12.0, 13.5)
"""Range of z: from 6e-6 to 3.6e5 times the coadd noise."""

_TILE = {"cpu": 512, "cuda": 2048}
"""Side in pixels, a multiple of the coarsest pixel, of the tiles of inference by device."""

_DECODED_BORDER = 4
"""Pixels of the decoder around those that are wanted, at every resolution: its two convolutions reach two,
the exit one, and the next coarser pixels have to be whole."""

_HALF = ("cuda",)
"""Devices on which inference is in bfloat16, which is no faster on a CPU."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What the encoder reads of sets of visits.

    Parameters
    ----------
    channels : `torch.Tensor`, (set, feature, y, x)
        Images in units of the coadd noise, asinh-stretched, in the order of `FEATURES`.
    start : `torch.Tensor`, (set, y, x)
        z_0, the base in the network's own variable: the image of few steps, which amplifies noise less, and
        on bright pixels where that does not fit the data yet the image of more of them: of the fewest that
        do in galaxies, of all in stars.
    gate : `torch.Tensor`, (set, y, x)
        Part of the network's correction that is let through: next to none where few steps do not fit the
        data, since the start already does.
    noise : `torch.Tensor`, (set, y, x)
        Coadd noise sigma_c (nJy); it is positive everywhere on the canvas.
    covered : `torch.Tensor`, (set, y, x)
        Whether a visit of the set sees the pixel of the canvas.
    """

    channels: torch.Tensor
    start: torch.Tensor
    gate: torch.Tensor
    noise: torch.Tensor
    covered: torch.Tensor

    def __getitem__(self, index: int | slice) -> Features:
        """Select sets; a single index keeps no set dimension."""
        return Features(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Put the features of several batches of sets together."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def encoder_features(solution: MaximumLikelihood) -> Features:
    """Turn the statistics of sets of visits into the channels of the encoder.

    They are the robust inverse-variance coadd, the matched-filter image, the maximum-likelihood images after
    very few, few and many steps, and the gradient that the last leaves, all divided by the coadd noise
    ``sensitivity^-1/2`` and asinh-stretched. Those of a set depend on the data of its own visits only.

    Parameters
    ----------
    solution : `~lsst.coadd.deepprior.baselines.MaximumLikelihood`
        Maximum-likelihood images and statistics of the sets.

    Returns
    -------
    features : `Features`
        Channels, start and noise of every set.
    """
    statistics = solution.statistics
    sets = statistics.sets
    tiny = torch.finfo(statistics.matched.dtype).tiny
    typical = sets.sensitivity.amax(dim=(-2, -1), keepdim=True)
    covered = sets.sensitivity > 1e-2 * typical
    noise = torch.maximum(sets.sensitivity, 1e-2 * typical).clamp_min(tiny).rsqrt()
    full = torch.maximum(sets.gram.forward(torch.ones_like(noise)), 1e-2 * typical).clamp_min(tiny)
    signal = (solution.early / (_SIGNAL * noise)).square()

    def unresolved(image: torch.Tensor) -> torch.Tensor:
        left = _significance(sets, statistics.matched - sets.gram.forward(image), full)
        left = (left / _UNRESOLVED).square()
        return signal / (1.0 + signal) * left / (1.0 + left)

    base = solution.early
    star = share = unresolved(solution.early)
    for image in solution.stages:
        base = torch.lerp(base, image, share)
        share = unresolved(image)
    base = torch.lerp(base, solution.latent, share)
    images = (
        statistics.coadd,
        statistics.matched / full,
        solution.first,
        solution.early,
        solution.latent,
        (statistics.matched - sets.gram.forward(solution.latent)) / full,
    )
    return Features(
        channels=torch.stack([torch.asinh(image / noise) * covered for image in images], dim=1),
        start=torch.log(torch.expm1(torch.asinh(base / noise).clamp_min(0.02))),
        gate=1.0 - star,
        noise=noise,
        covered=covered,
    )


def _significance(sets: VisitSets, gradient: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Return the largest significance of a gradient in the neighbourhood of a pixel, smoothed.

    The noise of the gradient ``A u - M`` has the variance of the central value of A, which is taken where the
    set is deepest and scaled with the depth.
    """
    probe = torch.zeros_like(gradient)
    deepest = sets.sensitivity.flatten(-2).argmax(dim=-1, keepdim=True)
    probe.flatten(-2).scatter_(-1, deepest, 1.0)
    central = ((sets.gram.forward(probe) / full) * probe).sum(dim=(-2, -1), keepdim=True)
    significance = gradient.abs() / (central * full).clamp_min(torch.finfo(full.dtype).tiny).sqrt()
    image = box_maximum(significance, _NEIGHBOURHOOD, _NEIGHBOURHOOD)[:, None]
    half = _NEIGHBOURHOOD // 2
    for axis in ((1, 0), (0, 1)):
        border = (half * axis[1], half * axis[1], half * axis[0], half * axis[0])
        window = (1 + 2 * half * axis[0], 1 + 2 * half * axis[1])
        padded = torch.nn.functional.pad(image, border, mode="replicate")
        image = torch.nn.functional.avg_pool2d(padded, window, stride=1)
    return image[:, 0]


def latent_and_slope(z: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``u = sigma_c sinh(softplus(z))`` and its derivative ``du/dz``.

    Parameters
    ----------
    z : `torch.Tensor`, (..., y, x)
        The network's variable, clamped to the range in which u is finite in float32.
    noise : `torch.Tensor`, (..., y, x)
        Coadd noise sigma_c (nJy).

    Returns
    -------
    latent, slope : `torch.Tensor`, (..., y, x)
        Non-negative latent image u and du/dz, both in nJy.
    """
    z = z.clamp(*_LATENT_RANGE)
    stretched = torch.nn.functional.softplus(z)
    return noise * torch.sinh(stretched), noise * torch.cosh(stretched) * torch.sigmoid(z)


class _PixelNorm(nn.Module):
    """Normalise the channels of every pixel to zero mean and unit variance, with learned scale and offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        last = torch.nn.functional.layer_norm(x.movedim(1, -1), weight.shape, weight, bias)
        return last.movedim(-1, 1)


class _Block(nn.Module):
    """Two 3x3 convolutions with normalisation and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = _PixelNorm(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.silu(self.norm(self.first(x)), inplace=True)
        return self.second(inner).add_(x)


class Trunk(nn.Module):
    """Encoder/decoder at half resolution that predicts the correction to z.

    Parameters
    ----------
    widths : `tuple` [`int`, ...], optional
        Channels at 1/2, 1/4, 1/8 ... of the resolution.
    in_channels : `int`, optional
        Channels of the input.

    Notes
    -----
    The last layer starts at zero, so that the untrained network returns the base.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 48, 64), in_channels: int = len(FEATURES)) -> None:
        super().__init__()
        self.entry = nn.Conv2d(4 * in_channels, widths[0], 3, padding=1)
        self.encoders = nn.ModuleList(_Block(w) for w in widths)
        self.downs = nn.ModuleList(
            nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.decoders = nn.ModuleList(_Block(w) for w in widths[:-1])
        self.exit = nn.Conv2d(widths[0], 4, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        if self.exit.bias is not None:
            nn.init.zeros_(self.exit.bias)
        self._step = 2 ** len(widths)
        # What 3x3 convolutions reach, one at entry and exit and two in every block, and a coarsest pixel.
        reach = 2 * (2 + 2 * (self._step - 1) + 2 * (self._step // 2 - 1)) + self._step
        self._reach = -(-reach // self._step) * self._step

    def forward(
        self, channels: torch.Tensor, inside: tuple[slice, slice] = (slice(None), slice(None))
    ) -> torch.Tensor:
        """Predict the correction to z.

        Parameters
        ----------
        channels : `torch.Tensor`, (set, feature, y, x)
            Features of any shape; they are continued at the edges to a multiple of the coarsest pixel.
        inside : `tuple` [`slice`], optional
            Rows and columns that are wanted, from a coarsest pixel on; the decoder leaves out what has no
            part in them.

        Returns
        -------
        correction : `torch.Tensor`, (set, y, x)
            To be added to z_0; of ``inside``.
        """
        ny, nx = channels.shape[-2:]
        padded = torch.nn.functional.pad(
            channels, (0, -nx % self._step, 0, -ny % self._step), mode="replicate"
        )
        # Convolutions, and means over channels, are faster with channels last.
        quarters = torch.nn.functional.pixel_unshuffle(padded, 2)
        x = self.entry(quarters.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x)
            if level < len(self.downs):
                skips.append(x)
                x = self.downs[level](x)
        wanted = [part.indices(n)[:2] for part, n in zip(inside, (ny, nx), strict=True)]
        origin = [0, 0]
        for level in reversed(range(len(self.downs))):
            skip, scale = skips[level], 2 ** (level + 1)
            low = [max(first // scale - _DECODED_BORDER, 0) for first, _ in wanted]
            high = [
                min(-(-last // self._step) * (self._step // scale) + _DECODED_BORDER, n)
                for (_, last), n in zip(wanted, skip.shape[-2:], strict=True)
            ]
            for dim, some, begin, end in zip((-2, -1), origin, low, high, strict=True):
                x = x.narrow(dim, begin // 2 - some, (end - begin) // 2)
                skip = skip.narrow(dim, begin, end - begin)
            x = skip + torch.nn.functional.interpolate(self.ups[level](x), scale_factor=2, mode="nearest")
            x, origin = self.decoders[level](x), low
        correction = torch.nn.functional.pixel_shuffle(self.exit(x), 2)[:, 0]
        for dim, some, (first, last) in zip((-2, -1), origin, wanted, strict=True):
            correction = correction.narrow(dim, first - 2 * some, last - first)
        return correction

    def tile_by_tile(self, channels: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
        """Predict the correction of an image of any size with the memory of a tile, and without seams.

        Tiles overlap by what the network sees around a pixel, so that the result is that of the whole image.
        On a GPU the convolutions are those of bfloat16.

        Parameters
        ----------
        channels : `torch.Tensor`, (feature, y, x)
            Features.
        dy, dx : `int`
            Number of rows and columns, 0 or 1, by which the image is shifted to larger y and x for the
            network.

        Returns
        -------
        correction : `torch.Tensor`, (y, x)
            To be added to z_0, at its place.
        """
        ny, nx = channels.shape[-2:]
        device = channels.device.type
        size = _TILE.get(device, _TILE["cuda"])
        half: Callable[[], AbstractContextManager] = nullcontext
        if device in _HALF:
            half = functools.partial(torch.autocast, device, torch.bfloat16)
        correction = torch.empty_like(channels[0])

        def predict(spans: tuple[_Span, _Span]) -> None:
            rows, columns = spans
            tile = channels[None, :, rows.source, columns.source]
            padding = (columns.before, 0, rows.before, 0)
            tile = torch.nn.functional.pad(tile, padding, mode="replicate")
            with half():
                result = self(tile, (rows.inside, columns.inside))[0]
            correction[rows.target, columns.target] = result[rows.outside :, columns.outside :]

        rows, columns = (_spans(n, shift, size, self._step, self._reach) for n, shift in ((ny, dy), (nx, dx)))
        in_parallel(predict, list(itertools.product(rows, columns)), channels)
        return correction


class _Span(NamedTuple):
    """Pixels of a tile along one axis."""

    source: slice
    """Those that are read."""
    before: int
    """How often the first of them is repeated before them."""
    inside: slice
    """Those of the result that are right."""
    outside: int
    """How many of them are before the image."""
    target: slice
    """Where the others belong."""


def _spans(length: int, shift: int, size: int, step: int, reach: int) -> list[_Span]:
    """Cut an axis that is shifted by some pixels into equal tiles, each a multiple of a step and at most of
    some size, with some pixels around them.
    """
    number = -(-(length + shift) // size)
    size = step * -(-(length + shift) // (number * step))
    spans = []
    for first in range(0, length + shift, size):
        last = min(first + size, length + shift)
        low, high = max(first - reach, 0), min(last + reach, length + shift)
        begin = max(first, shift)
        spans.append(
            _Span(
                slice(max(low - shift, 0), high - shift),
                shift if low == 0 else 0,
                slice(first - low, last - low),
                begin - first,
                slice(begin - shift, last - shift),
            )
        )
    return spans
