# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""Stars just outside of the patch, of whose light the data have one side.

Multiplicative steps bring the light that a star beyond the border casts into the patch to the pixels next to
the border, and would need thousands of steps to take it from there to where the star is. What is missing is
the place, which the plain coadd tells: its pixels near such a pile of light are fitted by

.. math:: F\, \bar f(q - p) + (\bar k * u_\mathrm{rest})(q),

with :math:`\bar f` the PSF of the coadd, :math:`\bar k` the kernel that makes it of the latent image, and
:math:`u_\mathrm{rest}` the latent image without the pile. The star is then a point on the canvas, of which
`~lsst.coadd.deepprior.point_sources.point_sources` takes care as of any other.
"""

from __future__ import annotations

__all__ = ("coadd_stamps", "place_border_stars")

import dataclasses
import itertools
import math

import numpy as np
import scipy.ndimage
import scipy.optimize
import torch

from .baselines import inner_smooth
from .patch_data import PatchData
from .point_templates import half_width, point_templates
from .psf import FWHM_PER_SIGMA, convolve_full, data_kernel, gaussian_stamp
from .statistics import VisitSets

_MIN_SNR = 30.0
"""Signal to noise ratio of a pile, as that of `~lsst.coadd.deepprior.point_sources.point_sources`."""

_NEAR = 3
"""Distance in pixels from the border within which light is piled up."""

_BEYOND = 6.0
"""Largest distance in pixels of a star from the border: light from farther away is spread more evenly."""

_HALF = 9
"""Half the width in pixels of the box that is fitted."""

_CORE = 4.0
"""Radius of the disc in which a star replaces the image, in sigma of the target, beside its distance from the
border."""

_RING = 4.0
"""Width in pixels of the ring around the disc that tells the light under the star."""

_UNDER = 0.25
"""Quantile of the ring that is taken as the light under the star."""

_OTHER_SNR = 8.0
"""Signal to noise ratio above which another peak keeps the light around it."""

_CLIP_PSF_ERROR = 1.0
"""Relative error of the PSF at which visits are clipped: the wings of a pile are not those of the star, and
with 0.3 clipping takes half of the flux of a star 3 pixels beyond."""

_PSF_ERROR = 0.01
"""Relative error of the PSF of the coadd in the fit."""

_WHOLE = 0.95
"""Part of the largest weight in the box that a pixel must have: masked visits change the PSF of the coadd."""

_FEWEST = 30
"""Least number of pixels of a fit."""

_GOOD_CHI2 = 2.0
"""A star stays if it explains the box better than the pile, or within so much of its noise per pixel."""


def coadd_stamps(data: PatchData) -> np.ndarray:
    """Read the visits once for the PSF of their coadd at the pixels that visits have.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.

    Returns
    -------
    stamps : `numpy.ndarray`, (i, j, k, k)
        Weighted mean of the PSFs of the visits of every cell, of unit sum; 0 in cells without a visit. On a
        grid that is finer by an even factor, where pixels of the visits lie between those of the coadd, it is
        that of the interpolated coadd.
    """
    total = np.zeros((*data.weight.shape[1:], 1, 1))
    for index in np.flatnonzero(data.weight.any(axis=(1, 2))).tolist():
        psf = np.nan_to_num(data.observations[index].psf)
        border = (psf.shape[-1] - total.shape[-1]) // 2
        total = np.pad(total, ((0, 0), (0, 0), *((max(border, 0),) * 2,) * 2))
        own = np.pad(psf, ((0, 0), (0, 0), *((max(-border, 0),) * 2,) * 2))
        total += data.weight[index][:, :, None, None] * own
    if data.sampling % 2 == 0:
        part, step = 0.5 / data.sampling, data.sampling
        total = np.pad(total, ((0, 0), (0, 0), (step, step), (step, step)))
        for axis in (-2, -1):
            total = (1.0 - part) * total + part * np.roll(total, step, axis=axis)
    sums = total.sum(axis=(-2, -1), keepdims=True)
    return np.divide(total, sums, out=np.zeros_like(total), where=sums > 0.0)


def place_border_stars(
    data: PatchData, sets: VisitSets, latent: torch.Tensor, stamps: np.ndarray
) -> torch.Tensor:
    """Put the light that is piled up at the border of the patch into stars beyond it, where they explain it.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all visits.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy.
    stamps : `numpy.ndarray`, (i, j, k, k)
        What `coadd_stamps` returns.

    Returns
    -------
    latent : `torch.Tensor`, (y, x)
        The image with stars beyond the border, in nJy; the same one if there is none.
    """
    piles, others = _piles(data, latent)
    if len(piles) == 0:
        return latent
    statistics = data.linearise(sets, latent[None], psf_error=_CLIP_PSF_ERROR)
    coadd, depth = statistics.coadd[0].cpu().numpy(), sets.depth[0].cpu().numpy()
    result, layout, step = latent.cpu().numpy().copy(), data.layout, data.sampling
    reach = math.ceil((_HALF + _BEYOND + _RING) * step + _CORE * data.sigma) + stamps.shape[-1] // 2
    for pile in piles:
        i, j = ((pile - data.margin) // (layout.height, layout.width)).tolist()
        window = tuple(slice(max(c - reach, 0), c + reach + 1) for c in pile.tolist())
        origin = np.array([s.start for s in window])
        near = others[np.abs(others - pile).max(axis=-1) <= reach]
        view = _View(
            latent=result[window],
            coadd=coadd[window],
            depth=depth[window],
            low=data.margin - origin,
            high=data.margin - origin + layout.shape - 1,
            pile=pile - origin,
            others=near - origin,
            stamp=stamps[i, j],
            sigma=data.sigma,
            step=step,
        )
        result[window] = view.with_star()
    return torch.as_tensor(result, dtype=latent.dtype, device=latent.device)


def _beyond(place: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return by how many pixels places (..., 2: y, x) are outside of the centres of the pixels of a patch."""
    return np.maximum(low - place, place - high).max(axis=-1)


def _piles(data: PatchData, latent: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return peaks next to the border, the most significant first, and all peaks that keep their light."""
    low = np.array([data.margin, data.margin])
    high = low + data.layout.shape - 1
    image = inner_smooth(latent, data.sigma).cpu().numpy()
    seen = data.noise_of_gradient()[1].cpu().numpy()
    snr = image / float(gaussian_stamp(data.sigma).max()) * np.sqrt(np.maximum(seen, 0.0))
    patch = np.zeros(image.shape, dtype=bool)
    patch[low[0] : high[0] + 1, low[1] : high[1] + 1] = True
    image = np.where(patch, image, 0.0)
    piles, others = (
        np.argwhere(patch & (snr > least) & (image == scipy.ndimage.maximum_filter(image, width)))
        for width, least in ((5, _MIN_SNR), (3, _OTHER_SNR))
    )
    piles = piles[_beyond(piles, low, high) > -_NEAR * data.sampling]
    return piles[np.argsort(-snr[tuple(piles.T)], kind="stable")], others


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """What is around a pile, in pixels of a window."""

    latent: np.ndarray
    coadd: np.ndarray
    depth: np.ndarray
    low: np.ndarray
    """First row and column of the patch."""
    high: np.ndarray
    """Its last row and column."""
    pile: np.ndarray
    others: np.ndarray
    """Peaks, (peak, 2)."""
    stamp: np.ndarray
    sigma: float
    step: int

    def with_star(self) -> np.ndarray:
        """Return the latent image with a star beyond the border for the pile, or as it is."""
        low = np.maximum(self.pile - _HALF * self.step, self.low)
        high = np.minimum(self.pile + _HALF * self.step, self.high)
        box = (slice(low[0], high[0] + 1), slice(low[1], high[1] + 1))
        values, weight = self.coadd[box], self.depth[box]
        whole = (weight > 0.0) & (weight >= _WHOLE * weight.max())
        if self.step % 2 == 0:
            # Interpolated from the pixels before it too.
            whole[:, self.step :] &= whole[:, : -self.step]
            whole[self.step :] &= whole[: -self.step]
            whole[: self.step], whole[:, : self.step] = False, False
        if whole.sum() < _FEWEST or not self.stamp.any():
            return self.latent
        inverse_error = np.zeros(values.shape)
        inverse_error[whole] = (1.0 / weight[whole] + (_PSF_ERROR * values[whole]) ** 2) ** -0.5
        kernel = data_kernel(self.stamp, self.sigma)

        def deviation(latent: np.ndarray) -> np.ndarray:
            return inverse_error * (values - _carried(latent, kernel, box))

        def mean_square(latent: np.ndarray) -> float:
            return float((deviation(latent) ** 2).sum() / whole.sum())

        starts = self._starts()
        for _ in range(2):
            left = deviation(self._without_pile(starts[0]))
            flux, place = self._fitted(left, inverse_error, box, starts)
            starts = [place]
        room = half_width(self.sigma) + 1
        inside = (place > room).all() and (place < np.array(self.latent.shape) - 1 - room).all()
        if not inside or not -0.5 * self.step < self._beyond(place) <= _BEYOND * self.step:
            return self.latent
        moved = self._without_pile(place)
        (template,) = point_templates(self.sigma, np.array([[flux, place[1], place[0]]]))
        template.cut(moved)[...] += template.images[0]
        better = mean_square(moved) < max(mean_square(self.latent), _GOOD_CHI2)
        return moved if better else self.latent

    def _beyond(self, place: np.ndarray) -> np.ndarray:
        return _beyond(place, self.low, self.high)

    def _starts(self) -> list[np.ndarray]:
        """Return places at some distances beyond the border, or the borders of a corner, next to the pile."""
        gaps = {
            (axis, end): abs(self.pile[axis] - end[axis])
            for axis, end in itertools.product((0, 1), (tuple(self.low), tuple(self.high)))
        }
        near = [border for border, gap in gaps.items() if gap <= max(min(gaps.values()), self.step)]
        places = []
        for pixels in range(int(_BEYOND)):
            place = self.pile.astype(float)
            for axis, end in near:
                place[axis] = end[axis] + math.copysign(pixels * self.step, end[axis] - self.low[axis] - 0.5)
            places.append(place)
        return places

    def _fitted(
        self,
        left: np.ndarray,
        inverse_error: np.ndarray,
        box: tuple[slice, slice],
        starts: list[np.ndarray],
    ) -> tuple[float, np.ndarray]:
        """Fit a star to what is left, over its error; return its flux and its place."""
        pixels = np.array(np.mgrid[box], dtype=float)

        def star(place: np.ndarray) -> np.ndarray:
            offset = pixels - place[:, None, None] + self.stamp.shape[-1] // 2
            drawn = scipy.ndimage.map_coordinates(self.stamp, offset, order=3, mode="constant")
            return inverse_error * drawn

        def linear(start: np.ndarray) -> tuple[float, float]:
            drawn = star(start)
            flux = max(float((left * drawn).sum() / max((drawn**2).sum(), np.finfo(float).tiny)), 0.0)
            return float(((left - flux * drawn) ** 2).sum()), flux

        trials = [linear(start) for start in starts]
        best = min(range(len(starts)), key=lambda number: trials[number][0])
        scale = np.array([max(trials[best][1], 1.0), 1.0, 1.0])
        reach = (_BEYOND + _NEAR) * self.step
        solution = scipy.optimize.least_squares(
            lambda p: (left - p[0] * star(p[1:])).ravel(),
            [scale[0], *starts[best]],
            x_scale=scale,
            bounds=([0.0, *(self.pile - reach)], [np.inf, *(self.pile + reach)]),
            loss="soft_l1",
        )
        return float(solution.x[0]), solution.x[1:]

    def _without_pile(self, place: np.ndarray) -> np.ndarray:
        """Return the latent image without the light of the pile, whose star is at some place.

        Beyond the border nothing held it together, so it is taken from a wider disc there.
        """
        radius = _CORE * self.sigma + max(float(self._beyond(place)), 0.0)
        pixels = np.moveaxis(np.indices(self.latent.shape).astype(float), 0, -1)

        def distance(centre: np.ndarray) -> np.ndarray:
            return np.hypot(*np.moveaxis(pixels - centre, -1, 0))

        to_star, patch = distance(place), self._beyond(pixels) <= 0.0
        seeing = FWHM_PER_SIGMA * float(2.0 * np.pi * self.stamp.max()) ** -0.5
        disc = to_star <= np.where(patch, radius, radius + seeing)
        own = np.minimum(to_star, distance(self.pile))
        for other in self.others[np.abs(self.others - self.pile).max(axis=-1) > 1]:
            disc &= ~(patch & (distance(other) < own))
        ring = (to_star > radius) & (to_star <= radius + _RING * self.step) & patch
        under = np.quantile(self.latent[ring], _UNDER) if ring.any() else 0.0
        return np.where(disc, np.minimum(self.latent, under), self.latent).astype(self.latent.dtype)


def _carried(latent: np.ndarray, kernel: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """Convolve a latent image with a kernel within a box, as if it were zero outside."""
    half = kernel.shape[-1] // 2
    full = convolve_full(latent, kernel)
    ys, xs = box
    return full[ys.start + half : ys.stop + half, xs.start + half : xs.stop + half]
