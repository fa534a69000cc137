# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Inputs of tasks that work on finer pixels than the warps have, and so in another skymap."""

from __future__ import annotations

__all__ = ("FinerConfig", "check_lookups", "find_in_normal_skymap", "look_up_in_normal_skymap")

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lsst.daf.butler import DataCoordinate, DatasetRef, DatasetType, MissingDatasetTypeError
from lsst.daf.butler.registry import Registry
from lsst.pex.config import ChoiceField, Config
from lsst.pipe.base import NoWorkFound, PipelineTaskConnections
from lsst.pipe.base.connectionTypes import PrerequisiteInput

from ..finer_warps import normal_skymap


class FinerConfig(Config):
    """Configuration of a task that works on finer pixels than the warps have."""

    oversampling = ChoiceField[int](
        doc="How many times finer than those of the warps the pixels are along both axes. The coadds belong "
        "to the skymap of the warps with _x2 or _x3 behind its name, which deepprior finer-skymap registers.",
        default=2,
        optional=False,
        allowed={
            2: "Half the pixel of the warps: the usual choice, for seeing down to 1.5 of their pixels.",
            3: "A third of the pixel of the warps, at more than twice the time and memory.",
        },
    )


def find_in_normal_skymap(
    dataset_type: DatasetType,
    registry: Registry,
    data_id: DataCoordinate,
    collections: Sequence[str],
    *,
    oversampling: int,
) -> list[DatasetRef]:
    """Find datasets of the same patch in the skymap that one with finer pixels belongs to.

    Parameters
    ----------
    dataset_type : `lsst.daf.butler.DatasetType`
        Type of the datasets.
    registry : `lsst.daf.butler.registry.Registry`
        Where to look.
    data_id : `lsst.daf.butler.DataCoordinate`
        Tract, patch, band and skymap, the latter with finer pixels.
    collections : `~collections.abc.Sequence` [`str`]
        Collections to search, in order.
    oversampling : `int`
        How many fine pixels a pixel has along an axis.

    Returns
    -------
    refs : `list` [`lsst.daf.butler.DatasetRef`]
        The datasets; none if the skymap is not that of such pixels.
    """
    skymap = normal_skymap(str(data_id["skymap"]), oversampling)
    if skymap is None:
        return []
    wanted = {name: data_id[name] for name in ("tract", "patch", "band")} | {"skymap": skymap}
    if dataset_type.dimensions.names == {"skymap"}:
        wanted = {"skymap": skymap}
    try:
        found = registry.queryDatasets(dataset_type, collections=collections, dataId=wanted, findFirst=True)
        return sorted(found)
    except MissingDatasetTypeError:
        return []


def look_up_in_normal_skymap(connections: Any, oversampling: int) -> None:
    """Have all inputs of a task that are not of its own dimensions looked up in the skymap of the warps.

    Parameters
    ----------
    connections : `lsst.pipe.base.PipelineTaskConnections`
        Connections of the task, within their constructor. ``finer_skymap`` stays as it is.
    oversampling : `int`
        How many fine pixels a pixel has along an axis.
    """
    assert isinstance(connections, PipelineTaskConnections)
    for name in sorted(connections.inputs - {"finer_skymap"}):
        connection = getattr(connections, name)
        if set(connection.dimensions) == set(connections.dimensions):
            continue
        found = PrerequisiteInput(
            doc=f"{connection.doc} They belong to the skymap of the warps.",
            name=connection.name,
            storageClass=connection.storageClass,
            dimensions=connection.dimensions,
            multiple=connection.multiple,
            deferLoad=connection.deferLoad,
            minimum=0,
            lookupFunction=functools.partial(find_in_normal_skymap, oversampling=oversampling),
        )
        setattr(connections, name, found)


def check_lookups(inputs: Mapping[str, Any], data_id: DataCoordinate) -> None:
    """Check that the warps of a quantum were found in their skymap, and its definition if it is needed.

    Parameters
    ----------
    inputs : `~collections.abc.Mapping`
        Connections and datasets, as ``adjustQuantum`` gets them.
    data_id : `lsst.daf.butler.DataCoordinate`
        Data ID of the quantum.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised if there are no warps.
    FileNotFoundError
        Raised if the sky map of direct warps is missing.
    """
    _, warps = inputs["direct_warps" if "direct_warps" in inputs else "warps"]
    if not warps:
        raise NoWorkFound(f"There are no warps for {data_id}.")
    if "sky_map" in inputs and not inputs["sky_map"][1]:
        raise FileNotFoundError(
            f"The input collections have no {inputs['sky_map'][0].name} of the skymap that the warps for "
            f"{data_id} belong to."
        )
