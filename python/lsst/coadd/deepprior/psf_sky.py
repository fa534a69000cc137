# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The sky as the refinement of PSFs sees it: stars of known shape, other light, pixels not to be trusted."""

from __future__ import annotations

__all__ = ("MIN_SNR", "MIN_STARS", "RefinementSky")

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.spatial
import torch

from .baselines import inner_smooth, maximum_likelihood
from .box_maximum import box_maximum
from .patch_data import PatchData
from .point_sources import PointSources, point_sources
from .point_templates import point_latent
from .psf import gaussian_stamp
from .psf_basis import FLUX, SHIFT_X, SHIFT_Y, PsfBasis
from .statistics import VisitTensors

MIN_STARS = 5
"""Number of stars from which the common mode is fitted."""

MIN_SNR = 50.0
"""Their least signal-to-noise ratio in all visits together."""

_REACH = 1.75
"""Radius in median FWHM around a star within which it tells the PSF."""

_NEIGHBOUR = 0.05
"""Flux of a point, or brightest peak of other light, within the reach of a star, over that of the star, with
which it does not count as alone."""

_LOCUS = 0.02
"""Scatter of the shapes of stars that is taken for one, in relative second moments."""

_LOCUS_CHI2 = 11.3
"""Largest chi^2 of three degrees of freedom of a star; a point exceeds it once in a hundred times."""

_LIT = 5.0
"""Significance of the matched image from which other light tells how PSFs differ."""

_SKY_ERROR = 0.03
"""Relative error that is granted to all light but that of stars, of which the shape is not known."""

_HUBER = 3.0
"""Deviation in standard deviations from which a pixel counts linearly."""

_OUTLIER = 4.0
"""Significance of the residuals at the seeing from which pixels are left out, as are those around them."""

_OUTLIER_PSF_ERROR = 0.015
"""Least relative error that is granted to PSFs where outliers are told."""

_MASKED = 5.0
"""Predicted flux of a masked pixel, in standard deviations, around which the sky is not known well enough."""


class RefinementSky:
    """The sky of a pass: stars that tell the PSF, and all other light.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits, with the PSFs as they are known.
    basis : `~lsst.coadd.deepprior.psf_basis.PsfBasis`
        How PSFs may change.
    base_steps : `int`
        Steps of maximum likelihood behind the sky.

    Attributes
    ----------
    stars : `numpy.ndarray`, (star, 3)
        y, x on the canvas and flux in nJy of the stars that tell the PSF, none where they are too few.
    anchored : `bool`
        Whether there are at least `MIN_STARS` of them.
    n_candidates : `int`
        Number of points that are bright and alone.
    star_light, other_light : `torch.Tensor`, (y, x)
        Latent image of the stars, and of the light that is not near one, in nJy.
    owner : `torch.Tensor`, (y, x), int
        Star within whose reach a pixel is, -1 for none.
    lit : `torch.Tensor`, (y, x), bool
        Pixels whose light tells how the PSFs of visits differ.
    """

    def __init__(self, data: PatchData, basis: PsfBasis, base_steps: int) -> None:
        self.data = data
        self.basis = basis
        sets = data.sets()
        solution = maximum_likelihood(data, sets, steps=base_steps)
        points = point_sources(data, sets, solution.latent[0])
        seeing = float(np.median(data.seeing[data.group >= 0]))
        self.reach = _REACH * seeing
        self.width = 2 * round(0.5 * seeing) + 1
        self._fft_shape = tuple(scipy.fft.next_fast_len(n + 4 * round(seeing), real=True) for n in data.shape)
        transfer = basis.transfer(self._fft_shape, np.complex64)
        self._transfer = torch.as_tensor(transfer, device=data.device)
        self.latent = points.latent
        candidates = self._candidates(points)
        self.n_candidates = len(candidates)
        self._separate(candidates)
        self.stars = candidates[self._on_locus(candidates)]
        self.anchored = len(self.stars) >= MIN_STARS
        if not self.anchored:
            self.stars = self.stars[:0]
        self._separate(self.stars)
        significant = solution.statistics.seen[0] > _LIT * data.matched_noise()
        self.lit = _grown(significant, self.width)

    def _candidates(self, points: PointSources) -> np.ndarray:
        """Return y, x and flux of the points that are bright and alone, (candidate, 3)."""
        data = self.data
        every = np.column_stack([points.y, points.x, points.flux])
        margin, (ny, nx) = data.margin, data.layout.shape
        power = data.gram_kernel()
        half = power.shape[-1] // 2
        # The kernels lack the inner one, so this is somewhat more than the S/N of a point.
        information = data.pixel_weight(power[..., half, half].cpu().numpy())
        rows, columns = (np.rint(every[:, k]).astype(int) - margin for k in (0, 1))
        inside = np.flatnonzero((rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx))
        snr = every[inside, 2] * np.sqrt(information[rows[inside], columns[inside]])
        bright = inside[snr > MIN_SNR]
        found = every[bright]
        if len(found) == 0:
            return found
        rest = self.latent - self._drawn(every)
        image = inner_smooth(rest, data.sigma).cpu().numpy()
        peaks = np.argwhere((image == scipy.ndimage.maximum_filter(image, 5)) & (image > 0.0))
        height = float(gaussian_stamp(data.sigma).max())
        alone = np.ones(len(found), dtype=bool)
        near = scipy.spatial.cKDTree(found[:, :2])
        for peak, value in zip(peaks, image[tuple(peaks.T)], strict=True):
            for k in near.query_ball_point(peak, self.reach):
                alone[k] &= value < _NEIGHBOUR * height * found[k, 2]
        for number, (y, x, flux) in enumerate(every):
            for k in near.query_ball_point((y, x), self.reach):
                alone[k] &= number == bright[k] or flux < _NEIGHBOUR * found[k, 2]
        return found[alone]

    def _drawn(self, stars: np.ndarray) -> torch.Tensor:
        """Return the latent image of stars (star, 3: y, x, flux)."""
        data = self.data
        canvas = np.zeros(data.shape)
        for y, x, flux in stars:
            iy, ix = round(y), round(x)
            stamp = point_latent(data.sigma, y - iy, x - ix)
            y0, x0 = iy - stamp.shape[0] // 2, ix - stamp.shape[0] // 2
            canvas[y0 : y0 + stamp.shape[0], x0 : x0 + stamp.shape[0]] += flux * stamp
        return torch.as_tensor(canvas, dtype=data.dtype, device=data.device)

    def _separate(self, stars: np.ndarray) -> None:
        """Divide the latent image into stars and other light, of which there is none near a star."""
        self.star_light = self._drawn(stars)
        y, x = np.indices(self.data.shape)
        owner = np.full(self.data.shape, -1)
        if len(stars):
            distance, nearest = scipy.spatial.cKDTree(stars[:, :2]).query(np.dstack([y, x]))
            owner[distance <= self.reach] = nearest[distance <= self.reach]
        self.owner = torch.as_tensor(owner, device=self.data.device)
        rest = (self.latent - self.star_light).clamp_min(0.0)
        self.other_light = torch.where(self.owner < 0, rest, 0.0)

    def templates(self, prediction: torch.Tensor, parameters: Sequence[int] | slice) -> torch.Tensor:
        """Return what parameters change in a prediction.

        Parameters
        ----------
        prediction : `torch.Tensor`, (y, x)
            What a visit sees, in nJy.
        parameters : `~collections.abc.Sequence` [`int`] or `slice`
            Places in the basis without the background.

        Returns
        -------
        changes : `torch.Tensor`, (parameter, y, x)
            Changes with a unit of each parameter.
        """
        spectrum = torch.fft.rfft2(prediction, s=self._fft_shape)
        images = torch.fft.irfft2(spectrum * self._transfer[parameters], s=self._fft_shape)
        return images[..., : prediction.shape[0], : prediction.shape[1]]

    def residual(
        self, visit: VisitTensors, star: torch.Tensor, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residuals and robust weights of the pixels of a visit.

        Parameters
        ----------
        visit : `~lsst.coadd.deepprior.statistics.VisitTensors`
            The visit.
        star, other : `torch.Tensor`, (y, x)
            What it is predicted to see of the stars and of other light, in nJy.

        Returns
        -------
        residual : `torch.Tensor`, (y, x)
            Data minus prediction in nJy, 0 where a pixel is not good.
        weight : `torch.Tensor`, (y, x)
            Weights in 1/nJy^2.

        Notes
        -----
        Pixels without weight are those that are not good, those of trails and of other things that the sky
        does not have, and those around a masked core.
        """
        good = visit.weight > 0
        # Pixels that are not good have no variance of their own.
        variance = torch.where(good, visit.variance, visit.variance[good].median())
        visit = dataclasses.replace(visit, variance=variance)
        prediction = star + other
        residual = torch.where(good, visit.flux - prediction, 0.0)
        scale = torch.hypot(self.data.scale(visit, star), _SKY_ERROR * other)
        deviation = residual / scale
        weight = (_HUBER / deviation.abs().clamp_min(1e-30)).clamp_max(1.0) / scale.square()
        # An error of the PSF or a shift is the same in all pixels of a star, and is no outlier.
        noise = variance.sqrt()
        smooth, light = self._smoothed(torch.stack([residual / noise, prediction.abs() / noise]))
        granted = max(self.data.psf_error, _OUTLIER_PSF_ERROR) * light
        outlier = smooth.abs() > _OUTLIER * torch.hypot(torch.ones_like(granted), granted)
        lost = _grown(outlier | (~good & (prediction > _MASKED * scale)), self.width)
        return residual, torch.where(good & ~lost, weight, 0.0)

    def _smoothed(self, images: torch.Tensor) -> torch.Tensor:
        """Smooth images (..., y, x) with the reference PSF, so that white noise keeps its variance."""
        stamp = gaussian_stamp(self.basis.sigma)
        kernel = torch.as_tensor(stamp / math.sqrt(np.sum(stamp**2))).to(images)
        return torch.nn.functional.conv2d(images[:, None], kernel[None, None], padding=stamp.shape[0] // 2)[
            :, 0
        ]

    def _on_locus(self, stars: np.ndarray) -> np.ndarray:
        """Tell which candidates have the shape that most have, (candidate,) bool."""
        if len(stars) < MIN_STARS:
            return np.zeros(len(stars), dtype=bool)
        # Flux, position, size, ellipticity, and light that is under the star in all visits alike.
        n = 7
        matrix, right = np.zeros((len(stars), n, n)), np.zeros((len(stars), n))
        chosen = self.owner >= 0
        owner = self.owner[chosen].cpu().numpy()
        wanted = [FLUX, SHIFT_X, SHIFT_Y, 3, 4, 5]
        for _, visit in self.data.visits():
            light = visit.kernel.forward(self.star_light)
            residual, weight = self.residual(visit, light, visit.kernel.forward(self.other_light))
            images = torch.cat([self.templates(light, wanted), torch.ones_like(light)[None]])
            columns = images[:, chosen].cpu().numpy().astype(float)
            weights, values = (image[chosen].cpu().numpy().astype(float) for image in (weight, residual))
            for k in range(len(stars)):
                own = owner == k
                part = columns[:, own] * weights[own]
                matrix[k] += part @ columns[:, own].T
                right[k] += part @ values[own]
        covariance = np.array([np.linalg.pinv(m, hermitian=True) for m in matrix])
        moments = np.einsum("kij,kj->ki", covariance, right)[:, 3:6]
        errors = covariance[:, 3:6, 3:6] + _LOCUS**2 * np.eye(3)
        difference = moments[:, None] - moments
        near = _chi2(difference, errors[:, None] + errors) < _LOCUS_CHI2
        most = near.sum(axis=1)
        members = near[min(np.flatnonzero(most == most.max()), key=lambda k: moments[k, 0])]
        inverse = np.linalg.inv(errors[members])
        centre = np.linalg.solve(inverse.sum(axis=0), np.einsum("kij,kj->i", inverse, moments[members]))
        return _chi2(moments - centre, errors) < _LOCUS_CHI2


def _grown(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Return the pixels that have a chosen one in the box of some odd width around them, (y, x) bool."""
    return box_maximum(chosen.float(), width, width) > 0.0


def _chi2(values: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return ``v^T C^-1 v`` of vectors (..., n) with covariances (..., n, n)."""
    return np.einsum("...i,...i->...", values, np.linalg.solve(covariance, values[..., None])[..., 0])
