# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps as inputs of a task: one-visit cell coadds, or afw exposures with their companions."""

from __future__ import annotations

__all__ = ("DirectWarpConfig", "DirectWarpConnections", "WarpFormConfig", "read_warps", "select_visits")

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lsst.pex.config import ChoiceField, Config, Field, RangeField
from lsst.pipe.base import (
    InputQuantizedConnection,
    NoWorkFound,
    PipelineTaskConnections,
    QuantumContext,
)
from lsst.pipe.base.connectionTypes import Input

from ..direct_warps import PatchGeometry, patch_from_skymap, warp_from_exposure
from ..warp_streams import WarpHandles
from ..warps import Warp

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

_VISIT_AND_PATCH = ("tract", "patch", "skymap", "visit", "instrument")


class WarpFormConfig(Config):
    """Configuration of a task that reads warps."""

    warp_form = ChoiceField[str](
        doc="In which form the warps are.",
        default="cell_coadd",
        optional=False,
        allowed={
            "cell_coadd": "One-visit cell coadds, deep_prior_warp, as deepprior ingest makes them.",
            "exposure": "afw exposures, direct_warp, as Data Release Production makes them; this needs a "
            "full Science Pipelines installation.",
        },
    )


class DirectWarpConfig(WarpFormConfig):
    """Configuration of a task that reads warps with their companions, all of which are for exposures only."""

    select_visits = Field[bool](
        doc="Whether only those visits of direct warps are used that deep_coadd_visit_selection names, as "
        "the deep coadd does.",
        default=False,
    )
    use_artifact_masks = Field[bool](
        doc="Whether the masks of artifacts that the deep coadd found by comparing visits are read, and "
        "their planes added to those of the direct warps; visits without one are left out, as in cell "
        "coadds.",
        default=False,
    )
    max_masked_fraction = RangeField(
        dtype=float,
        doc="Largest fraction of masked pixels among those that a pixel of a direct warp was resampled from; "
        "pixels above it are not used. Without it the fractions are not read.",
        default=None,
        optional=True,
        min=0.0,
        max=1.0,
    )
    n_noise_warps = RangeField(
        dtype=int,
        doc="Number of noise realisations that are read with each direct warp. They are part of the warp "
        "that the task is given; the restoration measures on the first how noise is correlated between "
        "pixels, and on blank sky where there is none.",
        default=0,
        min=0,
    )
    cell_size = RangeField(
        dtype=int,
        doc="Largest height and width in pixels of the cells that the PSF is taken as constant in, for "
        "direct warps of a sky map without cells; one with cells has its own. Where sizes from half of it up "
        "divide the patch, the largest of them is taken; otherwise cells reach beyond the patch.",
        default=150,
        min=16,
    )

    def validate(self) -> None:
        """Check that what only exposures have is asked for with exposures only."""
        super().validate()
        if self.warp_form != "exposure":
            for name in ("select_visits", "use_artifact_masks", "max_masked_fraction", "n_noise_warps"):
                if getattr(self, name) != self._fields[name].default:
                    raise ValueError(f"{name} needs warp_form = 'exposure'.")


class DirectWarpConnections(PipelineTaskConnections, dimensions=("tract", "patch", "band", "skymap")):
    """Warps and their companions; of those that the configuration does not ask for, none remains."""

    warps = Input(
        doc="Visits of the patch, resampled to the pixels of the tract, each with its PSF in every cell.",
        name="deep_prior_warp",
        storageClass="CellCoadd",
        dimensions=_VISIT_AND_PATCH,
        multiple=True,
        deferLoad=True,
    )
    direct_warps = Input(
        doc="Visits of the patch, resampled to the pixels of the tract, with warp_form = 'exposure'.",
        name="direct_warp",
        storageClass="ExposureF",
        dimensions=_VISIT_AND_PATCH,
        multiple=True,
        deferLoad=True,
    )
    masked_fractions = Input(
        doc="Fraction of masked pixels among those that each pixel of a direct warp was resampled from.",
        name="direct_warp_masked_fraction",
        storageClass="ImageF",
        dimensions=_VISIT_AND_PATCH,
        multiple=True,
        deferLoad=True,
    )
    artifact_masks = Input(
        doc="Masks of direct warps with the artifacts that the deep coadd found by comparing visits.",
        name="compare_warp_artifact_mask",
        storageClass="Mask",
        dimensions=_VISIT_AND_PATCH,
        multiple=True,
        deferLoad=True,
    )
    selected_visits = Input(
        doc="Visits that the deep coadd uses.",
        name="deep_coadd_visit_selection",
        storageClass="StructuredDataDict",
        dimensions=("instrument", "tract", "patch", "skymap", "band"),
        multiple=True,
    )
    sky_map = Input(
        doc="Definition of tracts, patches and cells.",
        name="skyMap",
        storageClass="SkyMap",
        dimensions=("skymap",),
    )

    def __init__(self, *, config: Any) -> None:
        if config.warp_form == "exposure":
            del self.warps
        else:
            del self.direct_warps
            del self.sky_map
        if config.max_masked_fraction is None:
            del self.masked_fractions
        if not config.use_artifact_masks:
            del self.artifact_masks
        if not config.select_visits:
            del self.selected_visits
        for n in range(config.n_noise_warps):
            noise = Input(
                doc="Images of noise alone, resampled like the direct warps.",
                name=f"deepCoadd_directWarp_noise{n}",
                storageClass="MaskedImageF",
                dimensions=_VISIT_AND_PATCH,
                multiple=True,
                deferLoad=True,
            )
            setattr(self, f"noise{n}_warps", noise)


def select_visits(
    handles: Iterable[Any],
    *,
    selections: Iterable[tuple[str, Mapping[Any, Any]]] | None = None,
    artifact_masks: Mapping[tuple[str, int], Any] | None = None,
    log: Logger | LoggerAdapter,
) -> list[Any]:
    """Choose the handles of the direct warps that are to be used.

    Parameters
    ----------
    handles : `~collections.abc.Iterable`
        Handles of all direct warps of the patch and band.
    selections : `~collections.abc.Iterable`, optional
        Name of an instrument and its selected visits, which are the keys of a mapping, as numbers or strings.
    artifact_masks : `~collections.abc.Mapping`, optional
        Handles of artifact masks by instrument and visit.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say which visits are left out.

    Returns
    -------
    chosen : `list`
        Handles of visits that are selected and have an artifact mask, as far as these are asked for.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised if none is left.
    """
    selected = None
    if selections is not None:
        selected = {(instrument, int(visit)) for instrument, visits in selections for visit in visits}
    chosen, n_handles = [], 0
    for handle in handles:
        n_handles += 1
        visit = _visit(handle)
        if selected is not None and visit not in selected:
            log.info("%s visit %d is not among the selected ones and is left out.", *visit)
        elif artifact_masks is not None and visit not in artifact_masks:
            log.info("%s visit %d has no artifact mask and is left out.", *visit)
        else:
            chosen.append(handle)
    if not chosen:
        raise NoWorkFound(
            f"None of the {n_handles} direct warps is of a visit that is selected and has the masks asked "
            "for."
        )
    return chosen


def read_warps(
    butlerQC: QuantumContext,
    inputRefs: InputQuantizedConnection,
    config: DirectWarpConfig,
    log: Logger | LoggerAdapter,
) -> WarpHandles:
    """Return the warps of a quantum, each of which is read when it is asked for.

    Parameters
    ----------
    butlerQC : `lsst.pipe.base.QuantumContext`
        Access to the Butler.
    inputRefs : `lsst.pipe.base.InputQuantizedConnection`
        Inputs, as `DirectWarpConnections` declares them.
    config : `DirectWarpConfig`
        What to read.
    log : `logging.Logger` or `logging.LoggerAdapter`
        Where to say which visits are left out.

    Returns
    -------
    warps : `~lsst.coadd.deepprior.warp_streams.WarpHandles`
        The warps.

    Raises
    ------
    lsst.pipe.base.NoWorkFound
        Raised if no visit is left after the selection.
    RuntimeError
        Raised if a visit lacks one of the companions that the configuration asks for.
    """
    if config.warp_form == "cell_coadd":
        return WarpHandles(butlerQC.get(inputRefs.warps))

    def by_visit(name: str) -> dict[tuple[str, int], Any]:
        return {_visit(handle): handle for handle in butlerQC.get(getattr(inputRefs, name))}

    selections = None
    if config.select_visits:
        selections = [(str(ref.dataId["instrument"]), butlerQC.get(ref)) for ref in inputRefs.selected_visits]
    artifact_masks = by_visit("artifact_masks") if config.use_artifact_masks else None
    handles = select_visits(
        butlerQC.get(inputRefs.direct_warps), selections=selections, artifact_masks=artifact_masks, log=log
    )
    companions: dict[str, Mapping[tuple[str, int], Any]] = {}
    if artifact_masks is not None:
        companions["artifact_mask"] = artifact_masks
    if config.max_masked_fraction is not None:
        companions["masked_fraction"] = by_visit("masked_fractions")
    noise = [by_visit(f"noise{n}_warps") for n in range(config.n_noise_warps)]
    for handle in handles:
        for name, found in [*companions.items(), *((f"noise warp {n}", one) for n, one in enumerate(noise))]:
            if _visit(handle) not in found:
                raise RuntimeError(f"The direct warp {handle.dataId} has no {name.replace('_', ' ')}.")

    quantum_id = butlerQC.quantum.dataId
    assert quantum_id is not None
    geometry = patch_from_skymap(
        butlerQC.get(inputRefs.sky_map),
        str(inputRefs.sky_map.dataId["skymap"]),
        int(quantum_id["tract"]),
        int(quantum_id["patch"]),
        config.cell_size,
    )
    read = functools.partial(
        _read_direct_warp,
        geometry=geometry,
        companions=companions,
        noise=noise,
        max_masked_fraction=config.max_masked_fraction,
    )
    return WarpHandles(handles, read)


def _visit(handle: Any) -> tuple[str, int]:
    return str(handle.dataId["instrument"]), int(handle.dataId["visit"])


def _read_direct_warp(
    handle: Any,
    *,
    geometry: PatchGeometry,
    companions: Mapping[str, Mapping[tuple[str, int], Any]],
    noise: Iterable[Mapping[tuple[str, int], Any]],
    max_masked_fraction: float | None,
) -> Warp:
    visit = _visit(handle)
    return warp_from_exposure(
        handle.get(),
        handle.dataId,
        geometry,
        noise=[one[visit].get() for one in noise],
        max_masked_fraction=1.0 if max_masked_fraction is None else max_masked_fraction,
        **{name: found[visit].get() for name, found in companions.items()},
    )
