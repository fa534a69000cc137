# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""What a network is trained on: patches of a Butler, of warp files, or of simulated scenes.

Pixels count as usable as the restoration's default configuration says.
"""

from __future__ import annotations

__all__ = ("TrainingData", "TrainingDataError", "butler_data", "file_data", "scene_data")

import contextlib
import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsst.daf.butler import (
    DatasetRef,
    DeferredDatasetHandle,
    EmptyQueryResultError,
    InvalidQueryError,
    MissingCollectionError,
    MissingDatasetTypeError,
)

from .ingest import DATASET_TYPE, DEFAULT_RUN, ingest_warp_files
from .progress import counted
from .psf import SAMPLED_FWHM, target_sigma
from .repositories import RepositoryError, open_repository
from .tasks.deep_prior_coadd_config import DeepPriorCoaddConfig
from .warp_streams import WarpHandles, WarpObservations, cell_layout
from .warps import Warp

if TYPE_CHECKING:
    from .training import TrainingPatch

type Progress = Callable[[str, int, int], None]

_CACHE_BYTES = 4 * 2**30
"""Memory that pixels of warps may take; others are read again each time."""

_MAX_SCENES = 1_000_000
"""Number of scenes that a seed stands for."""

_BAND = "r"
"""Band of the scenes; they are the same in all bands but for the fluxes."""

_MIN_VISITS = 2
"""A patch needs visits to read and visits to be judged by."""


class TrainingDataError(RuntimeError):
    """Raised for data that cannot be trained on; the message is one sentence."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Patches to train on.

    Parameters
    ----------
    patches : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.training.TrainingPatch`]
        The patches.
    fingerprint : `str`
        Changes whenever the data change.
    description : `str`
        What they are, for the card of the network.
    left_out : `tuple` [`str`], optional
        One message for each patch that is not among them.
    """

    patches: Sequence[TrainingPatch]
    fingerprint: str
    description: str
    left_out: tuple[str, ...] = ()


def scene_data(n_scenes: int, seed: int, progress: Progress) -> TrainingData:
    """Simulate scenes.

    Parameters
    ----------
    n_scenes : `int`
        Number of scenes.
    seed : `int`
        Number of the first scene in units of a million, so that scenes of different seeds differ; more scenes
        of a seed begin with the same ones.
    progress : `~collections.abc.Callable`
        Called with the name of the phase, the number of scenes done and the number of scenes.

    Returns
    -------
    data : `TrainingData`
        The scenes, in memory, with random target PSFs.

    Raises
    ------
    TrainingDataError
        Raised if there are more scenes than a seed has.
    """
    if n_scenes > _MAX_SCENES:
        raise TrainingDataError(f"A seed has {_MAX_SCENES} scenes; {n_scenes} are more.")
    from .families import training_scene
    from .simulate import Scene
    from .training import TrainingPatch

    patches = []
    configs = []
    for number in range(seed * _MAX_SCENES, seed * _MAX_SCENES + n_scenes):
        config = training_scene(number)
        configs.append(repr(config))
        scene = Scene(config)
        warps = (scene.warp(visit, _BAND) for visit in range(config.n_visits))
        observations = [warp.observation(_bad_planes()) for warp in warps]
        patches.append(
            TrainingPatch(
                name=f"training scene {number}",
                observations=observations,
                layout=cell_layout(scene.patch.cells),
                target_fwhm=_random_target([observation.seeing() for observation in observations], number),
            )
        )
        progress("simulating scenes", len(patches), n_scenes)
    fingerprint = f"{n_scenes} scenes of seed {seed} ({_digest(configs)})"
    return TrainingData(patches, fingerprint, counted(n_scenes, "simulated scene", "simulated scenes"))


def _random_target(seeing: Sequence[float], number: int) -> float | None:
    """Draw the FWHM of a target PSF in pixels, up to 0.6 times the seeing; `None` where none is possible."""
    highest = min(max(2.2, 0.6 * float(np.nanmedian(seeing))), 0.9 * float(np.nanmax(seeing)))
    if highest < SAMPLED_FWHM:
        return None
    return float(np.random.default_rng([number, 1]).uniform(SAMPLED_FWHM, highest))


@contextlib.contextmanager
def butler_data(
    repo: str | Path, collection: str, target_fwhm: float | None, progress: Progress
) -> Iterator[TrainingData]:
    """Take all patches and bands that have warps in a collection.

    Parameters
    ----------
    repo : `str` or `~pathlib.Path`
        Root directory, URI or alias of a Butler repository.
    collection : `str`
        The collection.
    target_fwhm : `float` or `None`
        FWHM of the target PSF in pixels; `None` is what the restoration chooses for each patch.
    progress : `~collections.abc.Callable`
        Called with the name of the phase, the number of patches done and the number of patches.

    Yields
    ------
    data : `TrainingData`
        Patches whose pixels are read when they are needed, those that do not fit in memory several times. A
        warp that cannot be read any more raises `TrainingDataError`.

    Raises
    ------
    TrainingDataError
        Raised if the repository cannot be read, a warp cannot be used, the target PSF of a patch cannot be
        made, or there is no patch and band with two usable warps.
    """
    try:
        butler = open_repository(repo)
    except RepositoryError as err:
        raise TrainingDataError(str(err)) from err
    with butler:
        try:
            refs = butler.query_datasets(DATASET_TYPE, collection, with_dimension_records=True, limit=None)
        except (EmptyQueryResultError, MissingCollectionError, MissingDatasetTypeError):
            raise TrainingDataError(
                f"The collection {collection} of {repo} has no warps; name one that has {DATASET_TYPE}."
            ) from None
        except InvalidQueryError as err:
            raise TrainingDataError(
                f"{collection} is no name of a collection of {repo}; name one, without wildcards ({err})."
            ) from err
        groups = [list(group) for _, group in itertools.groupby(sorted(refs, key=_patch_key), _patch_key)]
        patches = []
        left_out = []
        for n_done, group in enumerate(groups, start=1):
            name = "skymap {}, tract {}, patch {}, band {}".format(*_patch_key(group[0]))
            warps = _TrainingWarps(butler.getDeferred(ref) for ref in group)
            if (patch := _patch(name, warps, target_fwhm, _CACHE_BYTES / len(groups))) is not None:
                patches.append(patch)
            else:
                left_out.append(f"{name} is left out: fewer than two of its warps have usable pixels.")
            progress("reading patches", n_done, len(groups))
        if not patches:
            raise TrainingDataError("There is no patch and band of which two warps have usable pixels.")
        n_visits = sum(len(patch.observations) for patch in patches)
        yield TrainingData(
            patches,
            _digest([*sorted(str(ref.id) for ref in refs), str(target_fwhm)]),
            f"{n_visits} warps of {counted(len(patches), 'patch and band', 'patches and bands')}",
            tuple(left_out),
        )


@contextlib.contextmanager
def file_data(files: Sequence[Path], target_fwhm: float | None, progress: Progress) -> Iterator[TrainingData]:
    """Take all patches and bands of warp files.

    Parameters
    ----------
    files : `~collections.abc.Sequence` [`~pathlib.Path`]
        Warp files. They are put into a temporary repository, which checks that they fit together.
    target_fwhm : `float` or `None`
        FWHM of the target PSF in pixels; `None` is what the restoration chooses for each patch.
    progress : `~collections.abc.Callable`
        Called with the name of the phase, and how many of how many files or patches are done.

    Yields
    ------
    data : `TrainingData`
        The patches.

    Raises
    ------
    TrainingDataError
        Raised if there is no patch and band with two usable files.
    InvalidWarpFileError
        Raised if a file is not a valid warp file, or does not agree with the others.
    """
    with tempfile.TemporaryDirectory(prefix="deepprior") as folder:
        repo = Path(folder) / "repo"
        ingest_warp_files(repo, files, progress=progress)
        with butler_data(repo, DEFAULT_RUN, target_fwhm, progress) as data:
            contents = []
            for file in files:
                with file.open("rb") as stream:
                    contents.append(hashlib.file_digest(stream, "sha256").hexdigest())
            fingerprint = _digest([*sorted(contents), str(target_fwhm)])
            yield dataclasses.replace(data, fingerprint=fingerprint)


def _patch_key(ref: DatasetRef) -> tuple[str, int, int, str]:
    data_id = ref.dataId
    return str(data_id["skymap"]), int(data_id["tract"]), int(data_id["patch"]), str(data_id["band"])


class _TrainingWarps(Sequence[Warp]):
    """Warps that are read each time they are asked for, and end the training where that fails."""

    def __init__(self, handles: Iterable[DeferredDatasetHandle]) -> None:
        self._warps = WarpHandles(handles)

    def __len__(self) -> int:
        return len(self._warps)

    def __getitem__(self, index: int) -> Warp:  # type: ignore[override]
        try:
            return self._warps[index]
        except RuntimeError as err:
            raise TrainingDataError(str(err)) from err


def _patch(
    name: str, warps: Sequence[Warp], target_fwhm: float | None, cache_bytes: float
) -> TrainingPatch | None:
    """Return a patch in one band, `None` where fewer than two warps have a usable pixel."""
    from .training import TrainingPatch

    bad_planes = _bad_planes()
    observations = WarpObservations(warps, bad_planes, cache_bytes)
    seeing = []
    cells = None
    for index, warp in enumerate(warps):
        cells = warp.patch.cells if cells is None else cells
        if warp.patch.cells != cells:
            raise TrainingDataError(
                f"The warps of {name} have different cells; ingest all of them with one definition of the "
                "patch."
            )
        observation = warp.observation(bad_planes)
        if observation.good.any():
            observations.add(index, observation)
            try:
                seeing.append(observation.seeing())
            except ValueError as err:
                raise TrainingDataError(f"{name}: {err}") from err
    if len(observations) < _MIN_VISITS or cells is None:
        return None
    try:
        target_sigma(seeing, target_fwhm)
    except ValueError as err:
        raise TrainingDataError(f"{name}: {err}") from err
    return TrainingPatch(
        name=name, observations=observations, layout=cell_layout(cells), target_fwhm=target_fwhm
    )


def _bad_planes() -> list[str]:
    return list(DeepPriorCoaddConfig().bad_mask_planes)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
