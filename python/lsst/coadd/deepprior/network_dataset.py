# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Trained networks as datasets of a Butler."""

from __future__ import annotations

__all__ = (
    "DEFAULT_NETWORK_RUN",
    "NETWORK_DATASET_TYPE",
    "NETWORK_STORAGE_CLASS",
    "NetworkIngestError",
    "ingest_network",
    "network_from_dataset",
    "network_to_dataset",
)

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sqlalchemy.exc

from lsst.daf.butler import DatasetType
from lsst.daf.butler.registry import CollectionTypeError, ConflictingDefinitionError

from .repositories import RepositoryError, check_run_name, open_repository, unwrapped_errors

if TYPE_CHECKING:
    from .weights import TrainedNetwork

NETWORK_DATASET_TYPE = "deep_prior_network"
"""Name of the dataset type (`str`)."""

NETWORK_STORAGE_CLASS = "ArrowNumpyDict"
"""A storage class of every Butler that can hold the bytes of a file, as a Parquet column, without pickle."""

DEFAULT_NETWORK_RUN = "deepprior/network"
"""Collection that networks are written to unless another is named (`str`)."""

_COLUMN = "safetensors"


class NetworkIngestError(RuntimeError):
    """Raised if a network cannot be written to a repository; the message is one sentence."""


def network_to_dataset(network: TrainedNetwork) -> dict[str, np.ndarray]:
    """Put a network into the form in which the Butler stores it.

    Parameters
    ----------
    network : `~lsst.coadd.deepprior.weights.TrainedNetwork`
        The network.

    Returns
    -------
    dataset : `dict` [`str`, `numpy.ndarray`]
        One column of bytes, those of a safetensors file.

    Raises
    ------
    InvalidNetworkError
        Raised if a weight is not finite.
    """
    return {_COLUMN: np.frombuffer(network.to_bytes(), dtype=np.uint8)}


def network_from_dataset(dataset: Mapping[str, np.ndarray]) -> TrainedNetwork:
    """Take a network from the form in which the Butler stores it.

    Parameters
    ----------
    dataset : `~collections.abc.Mapping` [`str`, `numpy.ndarray`]
        What the Butler returns.

    Returns
    -------
    network : `~lsst.coadd.deepprior.weights.TrainedNetwork`
        The network.

    Raises
    ------
    InvalidNetworkError
        Raised if this is not a network that this version can use.
    """
    from .weights import InvalidNetworkError, TrainedNetwork

    if set(dataset) != {_COLUMN} or dataset[_COLUMN].dtype != np.uint8:
        raise InvalidNetworkError(f"The dataset is no network, its columns are {sorted(dataset)}.")
    return TrainedNetwork.from_bytes(dataset[_COLUMN].tobytes())


def ingest_network(repo: str | Path, network: TrainedNetwork, *, run: str = DEFAULT_NETWORK_RUN) -> bool:
    """Write a network to a Butler repository.

    Parameters
    ----------
    repo : `str` or `~pathlib.Path`
        Root directory, URI or alias of the repository.
    network : `~lsst.coadd.deepprior.weights.TrainedNetwork`
        The network.
    run : `str`, optional
        Collection to write to; it is made if absent, and holds one network.

    Returns
    -------
    is_new : `bool`
        Whether it was written; otherwise the collection holds this network already.

    Raises
    ------
    NetworkIngestError
        Raised if there is no such repository, it cannot be written, or the collection holds another network.
    InvalidNetworkError
        Raised if a weight is not finite.
    """
    dataset = network_to_dataset(network)
    try:
        check_run_name(run)
        with open_repository(repo, writeable=True) as butler:
            butler.registry.registerDatasetType(
                DatasetType(NETWORK_DATASET_TYPE, (), NETWORK_STORAGE_CLASS, universe=butler.dimensions)
            )
            butler.collections.register(run)
            if (ref := butler.find_dataset(NETWORK_DATASET_TYPE, collections=run)) is not None:
                if not np.array_equal(butler.get(ref).get(_COLUMN), dataset[_COLUMN]):
                    raise NetworkIngestError(
                        f"The collection {run} of {repo} holds another network; name another collection."
                    )
                return False
            with unwrapped_errors():
                butler.put(dataset, NETWORK_DATASET_TYPE, run=run)
            return True
    except RepositoryError as err:
        raise NetworkIngestError(str(err)) from err
    except (ConflictingDefinitionError, CollectionTypeError) as err:
        raise NetworkIngestError(f"The repository {repo} cannot take a network in {run}: {err}") from err
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as err:
        reason = str(getattr(err, "orig", err)).strip().rstrip(".")
        raise NetworkIngestError(f"The repository {repo} cannot be written: {reason}.") from err
