# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Skymaps with finer pixels in a Butler repository."""

from __future__ import annotations

__all__ = (
    "DEFAULT_FINER_SKYMAP_RUN",
    "FINER_SKYMAP_DATASET_TYPE",
    "FINER_SKYMAP_STORAGE_CLASS",
    "register_finer_skymap",
)

from lsst.daf.butler import Butler, DatasetType

from .dimension_records import copy_patches
from .finer_warps import finer_skymap
from .repositories import unwrapped_errors

FINER_SKYMAP_DATASET_TYPE = "deep_prior_finer_skymap"
"""Name of the dataset type that says which skymaps have finer pixels (`str`)."""

FINER_SKYMAP_STORAGE_CLASS = "StructuredDataDict"
"""Its storage class (`str`)."""

DEFAULT_FINER_SKYMAP_RUN = "deepprior/finer_skymaps"
"""Collection that they are written to unless another is named (`str`)."""


def register_finer_skymap(
    butler: Butler, skymap: str, oversampling: int, run: str = DEFAULT_FINER_SKYMAP_RUN
) -> tuple[str, int]:
    """Register a skymap with finer pixels and the tracts and patches of another one.

    Parameters
    ----------
    butler : `lsst.daf.butler.Butler`
        The repository, writeable.
    skymap : `str`
        Name of the skymap whose tracts and patches it has. What is there already stays.
    oversampling : `int`
        How many fine pixels a pixel has along an axis, 2 or 3.
    run : `str`, optional
        Collection for the dataset by which a pipeline finds the skymap.

    Returns
    -------
    name : `str`
        Name of the skymap (see `~lsst.coadd.deepprior.finer_warps.finer_skymap`).
    n_patches : `int`
        Number of its patches.

    Raises
    ------
    ValueError
        Raised if the factor is not 2 or 3, the skymap has finer pixels itself, or the repository has no patch
        of it.
    """
    name = finer_skymap(skymap, oversampling)
    if not butler.query_dimension_records("patch", skymap=skymap, limit=1, explain=False):
        raise ValueError(f"The repository has no patch of a skymap {skymap}; name that of the warps.")
    dataset_type = DatasetType(
        FINER_SKYMAP_DATASET_TYPE, ("skymap",), FINER_SKYMAP_STORAGE_CLASS, universe=butler.dimensions
    )
    butler.registry.registerDatasetType(dataset_type)
    butler.collections.register(run)
    with butler.transaction():
        n_patches = copy_patches(butler, skymap, name)
    if butler.find_dataset(dataset_type, {"skymap": name}, collections=run) is None:
        with unwrapped_errors():
            butler.put(
                {"skymap": skymap, "oversampling": oversampling}, dataset_type, {"skymap": name}, run=run
            )
    return name, n_patches
