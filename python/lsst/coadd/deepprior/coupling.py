# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

r"""What the bands of a patch tell each other: where there is light, and how sharp it is, but not how much.

Restorations of one band each, at one target PSF, are coupled afterwards. For band b the others make a
template,

.. math:: g_b = \sum_{o \neq b} \omega_o\, f_o\, c_{bo}\, u_o,

with :math:`c_{bo}` the typical flux ratio of the two bands in the patch, :math:`\omega_o` the share of o in
the inverse variance of all others in the flux of band b, and :math:`f_o` the part of the light of o that is
not of o alone, since some third band has it too: what a third band shows itself, and of what goes beyond that
and the scatter of colours the part that its data do not rule out. Bands with too little significant light in
common for a ratio tell each other nothing: one that was assumed would make light of the deep band appear in
the shallow one. The data of band b then tell the colour of what lies under the PSF: with d the significance
that they have there (:math:`c N / \sigma_M`, see `~lsst.coadd.deepprior.statistics`) and E that of the
template, the ratio :math:`\rho` of the two has the prior

.. math:: p(\rho) = p_0\, \delta(\rho) + (1 - p_0)\, \mathrm{LogNormal}(0, s)

and the likelihood :math:`N(d; \rho E, 1)`. Its posterior mean times the template is what the light of band b
would be if it had the structure of the others, and it is mixed with the own restoration,

.. math:: u_b \leftarrow w\, \bar\rho\, g_b + (1 - w)\, u_b, \qquad
          w = \frac{\sum_o D_o}{D_b + \sum_o D_o}\, \frac{1}{1 + (m / m_0)^4},

where D are the inverse variances and m is the significance of what :math:`\bar\rho\, g_b` leaves of the data
of band b; where only a part of the light has data, w is multiplied with that part. In the end the significant
sources get the flux that their own data have
(`~lsst.coadd.deepprior.data_steps.regain_flux`), and points are fitted to them anew.

A source that only another band has is suppressed twice: no third band confirms it, and the own data make its
colour nothing. A source that only band b has is not in the template, which leaves it in the data: m is large
and the own restoration stays.
"""

from __future__ import annotations

__all__ = ("BandLight", "coupled", "typical_ratio")

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from .data_steps import regain_flux
from .patch_data import PatchData
from .point_sources import PointSources, point_sources
from .psf import FWHM_PER_SIGMA
from .smoothing import gaussian_smooth
from .statistics import VisitSets

_SCATTER = 0.5
"""Scatter s of the natural logarithm of a colour about the typical one of the patch: half a magnitude, as
stars and galaxies have it between neighbouring bands. 0.35 gave the same on scenes that the benchmark does
not report."""

_ABSENT = 0.2
"""Probability p_0 that light of another band is not there, before the data are asked. With 0.02, noise that
happens to lie under a source of another band was taken for it; 0.2 cost no completeness on the same
scenes."""

_MISFIT = 4.0
"""Significance m_0 of what the template leaves at which half of it is believed. Chosen on the same scenes: 2
and 3 have more noise in the sky, 5 lets more light of other bands in."""

_LEAST_DEPTH = 0.01
"""Part of the largest depth of a band with less of which a pixel counts as not seen."""

_GRID = 25
"""Number of colours, out to 3 s, that the posterior is summed over."""

_SIGNIFICANT = 5.0
"""Significance under the PSF, in both bands, of the pixels that tell the typical colour."""

_FEWEST = 10
"""Number of such pixels with fewer of which the two bands are not coupled."""


@dataclasses.dataclass(frozen=True, eq=False)
class BandLight:
    """The restored light of a band, and the data that it was restored from.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits of the band.
    sets : `~lsst.coadd.deepprior.statistics.VisitSets`
        One set of all of them.
    latent : `torch.Tensor`, (y, x)
        Latent image u on the canvas, in nJy.
    """

    data: PatchData
    sets: VisitSets
    latent: torch.Tensor

    @functools.cached_property
    def noise(self) -> torch.Tensor:
        """Noise of the matched image; infinite in cells without a visit (`torch.Tensor`, (y, x), 1/nJy)."""
        noise = self.data.matched_noise()
        return torch.where(noise > 0.0, noise, torch.inf)

    @functools.cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = self.data.linearise(self.sets, self.latent[None])
        # Where nothing is seen, the coverage is a ratio of rounding errors.
        covered = self.depth > _LEAST_DEPTH * self.depth.max()
        return statistics.seen[0] * covered, statistics.coverage[0] * covered

    @property
    def depth(self) -> torch.Tensor:
        """Inverse variance with which the band sees a pixel (`torch.Tensor`, (y, x), 1/nJy^2)."""
        # Far from all visits, rounding leaves it a little below zero.
        return self.sets.sensitivity[0].clamp_min(0.0)

    @property
    def coverage(self) -> torch.Tensor:
        """Part of a prediction that has data (`torch.Tensor`, (y, x))."""
        return self._statistics[1]

    @property
    def seen(self) -> torch.Tensor:
        """Significance of the light that the data have under the PSF (`torch.Tensor`, (y, x))."""
        return self._statistics[0] / self.noise

    def significance(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the significance that light would have in the data of the band, (y, x)."""
        return self.coverage * self.sets.gram.forward(latent[None])[0] / self.noise

    def smoothed(self, image: torch.Tensor, significance: torch.Tensor) -> torch.Tensor:
        """Average an image over the PSF, with the squared significance of the light as the weight.

        So what is known of the core of a source holds in its wings, where nothing tells it.
        """
        sigma = float(np.median(self.data.seeing[self.data.group >= 0])) / FWHM_PER_SIGMA
        weight = significance.clamp_min(1e-3).square()
        return gaussian_smooth(weight * image, sigma) / gaussian_smooth(weight, sigma)


def typical_ratio(one: BandLight, other: BandLight) -> float | None:
    """Return the median flux ratio of two bands where both have significant light.

    Parameters
    ----------
    one, other : `BandLight`
        The bands.

    Returns
    -------
    ratio : `float` or `None`
        Flux in ``one`` over that in ``other``, `None` if too little is significant.
    """
    own, carried = one.significance(one.latent), one.significance(other.latent)
    bright = (own > _SIGNIFICANT) & (other.significance(other.latent) > _SIGNIFICANT)
    bright &= carried > 0.0
    if int(bright.sum()) < _FEWEST:
        return None
    return float((own[bright] / carried[bright]).median())


def _posterior(seen: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the posterior mean of the colour, and the probability that the light is not there, (y, x)."""
    steps = np.linspace(-3.0, 3.0, _GRID)
    prior = np.exp(-0.5 * steps**2)
    prior *= (1.0 - _ABSENT) / prior.sum()
    colours = [(0.0, math.log(_ABSENT)), *zip(np.exp(_SCATTER * steps), np.log(prior), strict=True)]
    best = torch.full_like(seen, -torch.inf)
    for colour, log_prior in colours:
        best = torch.maximum(best, log_prior - 0.5 * (seen - float(colour) * expected).square())
    total, first, absent = (torch.zeros_like(seen) for _ in range(3))
    for colour, log_prior in colours:
        part = torch.exp(log_prior - 0.5 * (seen - float(colour) * expected).square() - best)
        total += part
        first += float(colour) * part
        if colour == 0.0:
            absent = part
    return first / total, absent / total


def _missing(band: BandLight, light: torch.Tensor) -> torch.Tensor:
    """Return which part of the light of another band, in the flux of this one, is not in this one, (y, x).

    Asked is for what goes beyond the light of the band itself, since under the PSF a single-band source may
    have light of others about it, which looks like that source in another colour.
    """
    beyond = band.significance(light - math.exp(_SCATTER) * band.latent).clamp_min(0.0)
    left = band.seen - band.significance(band.latent)
    absent = band.smoothed(_posterior(left, beyond)[1], band.significance(light))
    own, other = (gaussian_smooth(image, band.data.sigma) for image in (band.latent, light))
    shown = own / other.clamp_min(torch.finfo(other.dtype).tiny)
    return ((absent - _ABSENT) / (1.0 - _ABSENT)).clamp(0.0, 1.0) * (1.0 - shown).clamp(0.0, 1.0)


def _templates(bands: Sequence[BandLight]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the light that its others let expect in each band, and their inverse variance in its flux, 0 if
    no ratio to any of them is known.
    """
    light = [torch.zeros_like(band.latent) for band in bands]
    depth = [torch.zeros_like(band.latent) for band in bands]
    for place, source in enumerate(bands):
        others = {n: typical_ratio(band, source) for n, band in enumerate(bands) if n != place}
        ratios = {n: ratio for n, ratio in others.items() if ratio is not None}
        missing: dict[int, torch.Tensor] = {}
        if len(ratios) > 1:
            missing = {n: _missing(bands[n], ratio * source.latent) for n, ratio in ratios.items()}
        for n, ratio in ratios.items():
            weight = source.depth / ratio**2
            depth[n] += weight
            thirds = [part for third, part in missing.items() if third != n]
            if thirds:
                weight = weight * (1.0 - torch.stack(thirds).prod(dim=0))
            light[n] += weight * ratio * source.latent
    tiny = torch.finfo(bands[0].latent.dtype).tiny
    return [(a / b.clamp_min(tiny), b) for a, b in zip(light, depth, strict=True)]


def coupled(bands: Sequence[BandLight]) -> list[PointSources | None]:
    """Couple the restorations of the bands of a patch.

    Parameters
    ----------
    bands : `~collections.abc.Sequence` [`BandLight`]
        Two bands or more, on one canvas and with one target PSF.

    Returns
    -------
    restored : `list` [`~lsst.coadd.deepprior.point_sources.PointSources` or `None`]
        The coupled latent image of each band, with the points in it; `None` for a band that stays as it is,
        since it has too little light in common with each of the others.

    Raises
    ------
    ValueError
        Raised if there are fewer than two bands, or their canvases or target PSFs differ.
    """
    if len(bands) < 2:
        raise ValueError("A band has no other to be coupled with; restore it alone.")
    for name, values in (
        ("canvas", {tuple(band.latent.shape) for band in bands}),
        ("target PSF", {round(band.data.sigma, 6) for band in bands}),
    ):
        if len(values) > 1:
            raise ValueError(f"The bands must have one {name}, but they have {sorted(values)}.")
    result: list[PointSources | None] = []
    for band, (template, depth) in zip(bands, _templates(bands), strict=True):
        if not depth.any():
            result.append(None)
            continue
        expected = band.significance(template)
        colour = band.smoothed(_posterior(band.seen, expected)[0], expected)
        light = colour * template
        misfit = (band.seen - band.significance(light)).abs() / _MISFIT
        tiny = torch.finfo(light.dtype).tiny
        share = depth / (depth + band.depth).clamp_min(tiny) / (1.0 + misfit**4)
        # Without data of its own a band keeps what its own restoration says, whatever the others have.
        share = share * band.coverage.clamp(0.0, 1.0)
        mixture = torch.lerp(band.latent, light, share).clamp_min(0.0)
        latent = regain_flux(band.data, band.sets, mixture)
        result.append(point_sources(band.data, band.sets, latent))
    return result
