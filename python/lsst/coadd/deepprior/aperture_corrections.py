# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Aperture corrections of coadds, from those of their visits."""

from __future__ import annotations

__all__ = ("average_corrections", "restored_corrections")

from collections.abc import Mapping, Sequence

import numpy as np

_PSF_FLUX = "base_PsfFlux_instFlux"
"""Name of the correction of PSF fluxes in Rubin's aperture correction maps."""


def average_corrections(
    corrections: Sequence[Mapping[str, np.ndarray]], weight: np.ndarray
) -> dict[str, np.ndarray]:
    """Average the aperture corrections of the visits of a coadd.

    The image of a star in the coadd is the weighted mean of its images in the visits, and so is, to first
    order, the correction of its flux: this is what Rubin's cell coadds do.

    Parameters
    ----------
    corrections : `~collections.abc.Sequence` [`~collections.abc.Mapping` [`str`, `numpy.ndarray`]]
        For each visit, factors (cell_i, cell_j) by the name of the flux, NaN where they are not known.
    weight : `numpy.ndarray`, (visit, cell_i, cell_j)
        Weight of a visit in a cell.

    Returns
    -------
    averages : `dict` [`str`, `numpy.ndarray`, (cell_i, cell_j)]
        Weighted means over the visits that know the correction; NaN where none of weight does.

    Raises
    ------
    ValueError
        Raised if there is not one array of weights for each visit.
    """
    if len(corrections) != len(weight):
        raise ValueError(f"There are corrections of {len(corrections)} visits and weights of {len(weight)}.")
    averages = {}
    for name in sorted(set().union(*corrections)):
        unknown = np.full(weight.shape[1:], np.nan)
        factors = np.array([visit.get(name, unknown) for visit in corrections])
        known = np.where(np.isfinite(factors), weight, 0.0)
        total = known.sum(axis=0)
        mean = np.sum(known * np.nan_to_num(factors), axis=0) / np.where(total > 0.0, total, 1.0)
        averages[name] = np.where(total > 0.0, mean, np.nan)
    return averages


def restored_corrections(
    corrections: Sequence[Mapping[str, np.ndarray]], weight: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the aperture corrections of the restored image.

    The restoration fits the visits with their PSF models, so a star of the restored image has its PSF flux,
    whatever measures it there, for its PSF is the advertised Gaussian. All fluxes that the visits know a
    correction of therefore take that of the PSF flux.

    Parameters
    ----------
    corrections, weight
        As for `average_corrections`.

    Returns
    -------
    restored : `dict` [`str`, `numpy.ndarray`, (cell_i, cell_j)]
        The correction of the PSF flux under the name of each flux, and its error, NaN if the visits do not
        know it, under the name of each error; empty if they do not know the correction.
    """
    averages = average_corrections(corrections, weight)
    if _PSF_FLUX not in averages:
        return {}
    error = averages.get(_PSF_FLUX + "Err", np.full(weight.shape[1:], np.nan))
    return {name: error if name.endswith("Err") else averages[_PSF_FLUX] for name in averages}
