# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Simulated scenes of several bands: one sky, colours, and a few sources that exist in one band only."""

from __future__ import annotations

__all__ = ("BandScene", "BandSceneConfig")

import dataclasses

import numpy as np
from astropy.table import Table, vstack

from .simulate import Scene
from .truth import AB_ZERO_POINT, BANDS, SceneConfig

_COLOUR_SCATTER = 0.12
"""Scatter in mag of each band about a sequence of one colour: galaxies at different redshifts and of
different ages are that far from one (0.1 to 0.2 mag in the Rubin bands)."""

_SIZE_GRADIENT = (0.05, 0.05)
"""Mean and scatter of the relative growth of half-light radii from the i to the g band: galaxies are bluer
outside, by some 5 per cent in size between these bands (Vulcani et al. 2014, MNRAS 441, 1340)."""

_EDGE = 20
"""Distance in pixels of the sources that exist in one band only from the border of the patch."""

_APART = 48
"""Side in pixels of the squares of a grid that have one of them at most, in their inner half."""


@dataclasses.dataclass(frozen=True)
class BandSceneConfig:
    """What a scene of several bands is made of.

    Parameters
    ----------
    scene : `~lsst.coadd.deepprior.truth.SceneConfig`
        What all bands share; its number of visits is not used.
    n_visits : `dict` [`str`, `int`]
        Number of visits of each band.
    n_single : `int`
        Number of point sources in each band that no other band has: transients, line emitters.
    single_magnitude : `tuple` [`float`, `float`]
        Their brightest and faintest magnitude in their band.

    Raises
    ------
    ValueError
        Raised if there is no band, a band is not simulated or has no visit.
    """

    scene: SceneConfig
    n_visits: dict[str, int]
    n_single: int = 3
    single_magnitude: tuple[float, float] = (20.5, 23.0)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.n_visits) - set(BANDS))
        if unknown or not self.n_visits or min(self.n_visits.values()) < 1:
            raise ValueError(
                f"n_visits must give a visit or more to some of the bands {', '.join(BANDS)}, but it is "
                f"{self.n_visits}."
            )


class BandScene(Scene):
    """A scene as one of several bands sees it.

    Parameters
    ----------
    config : `BandSceneConfig`
        What the scene is made of.
    band : `str`
        The band, one of ``config.n_visits``.
    with_singles : `bool`, optional
        Whether the sources that only one band has are there. Without them all else is the same, noise
        included, but for that of their own photons.
    """

    def __init__(self, config: BandSceneConfig, band: str, *, with_singles: bool = True) -> None:
        if band not in config.n_visits:
            raise ValueError(f"The scene has no band {band!r}; choose from {', '.join(config.n_visits)}.")
        super().__init__(dataclasses.replace(config.scene, n_visits=config.n_visits[band]))
        self.band = band
        self._bands = config
        self._with_singles = with_singles

    def catalogue(self, band: str) -> Table:
        """Return the objects that the band shows.

        Parameters
        ----------
        band : `str`
            The band of the scene.

        Returns
        -------
        catalogue : `astropy.table.Table`
            As that of `~lsst.coadd.deepprior.simulate.Scene`, and ``only`` (`bool`), whether no other band
            has the source.
        """
        result = super().catalogue(band)
        place = list(BANDS).index(band)
        rng = np.random.default_rng([self.config.seed, self.config.patch_id, 6])
        scatter = rng.normal(0.0, _COLOUR_SCATTER, (len(BANDS), len(result)))[place]
        growth = rng.normal(*_SIZE_GRADIENT, len(result)) * BANDS[band]
        result["mag"] += scatter
        result["hlr"] *= 1.0 + growth
        result["only"] = False
        if self._with_singles:
            singles = self.singles()
            result = vstack([result, singles[singles["band"] == band]], metadata_conflicts="silent")
            result.remove_column("band")
        result["flux_nJy"] = 10.0 ** ((AB_ZERO_POINT - np.asarray(result["mag"])) / 2.5)
        result["ra"], result["dec"] = self._wcs.pixel_to_world_values(result["x"], result["y"])
        return result

    def singles(self) -> Table:
        """Return the sources that exist in one band only.

        Returns
        -------
        singles : `astropy.table.Table`
            Columns as those of `catalogue`, and ``band``, the band that has the source.

        Raises
        ------
        ValueError
            Raised if the patch has no room for so many of them.
        """
        config, box = self._bands, self.patch.outer_bbox
        rng = np.random.default_rng([self.config.seed, self.config.patch_id, 7])
        n = config.n_single * len(config.n_visits)
        # One in each square of a grid, so that none has another in its neighbourhood.
        rows, columns = ((extent.size - 2 * _EDGE) // _APART for extent in (box.y, box.x))
        if n > rows * columns:
            raise ValueError(f"The patch has room for {rows * columns} single-band sources, not for {n}.")
        row, column = np.divmod(rng.permutation(rows * columns)[:n], columns)
        y, x = (
            start + _EDGE + _APART * (place + rng.uniform(0.25, 0.75, n))
            for start, place in ((box.y.start, row), (box.x.start, column))
        )
        return Table(
            {
                "id": -1 - np.arange(n),
                "type": np.full(n, "star"),
                "x": x,
                "y": y,
                "pair_id": np.full(n, -1),
                "hlr": np.zeros(n),
                "sersic_n": np.zeros(n),
                "axis_ratio": np.ones(n),
                "angle": np.zeros(n),
                "mag": rng.uniform(*config.single_magnitude, n),
                "only": np.full(n, True),
                "band": np.repeat(list(config.n_visits), config.n_single),
            }
        )
