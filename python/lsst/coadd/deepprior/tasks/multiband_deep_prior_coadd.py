# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that restores all bands of a patch together."""

from __future__ import annotations

__all__ = (
    "DeepPriorMultibandCoaddConfig",
    "DeepPriorMultibandCoaddConnections",
    "DeepPriorMultibandCoaddTask",
)

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsst.pex.config import Field, ListField
from lsst.pipe.base import (
    InputQuantizedConnection,
    NoWorkFound,
    OutputQuantizedConnection,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Output

from ..colour_picture import in_order
from ..fit_checkpoint import FitCheckpoint, checkpoint_file, inputs_digest, remove_checkpoint
from ..warp_streams import cell_layout
from ..warps import Warp
from .deep_prior_coadd import BandInputs, DeepPriorCoaddTask, visit_psf_refs
from .deep_prior_coadd_config import DeepPriorCoaddConfig, DeepPriorCoaddConnections
from .direct_warp_inputs import read_warps
from .execution import gpu_peak_bytes, memory_of, open_checkpoint, refined_observations, run_on_node

if TYPE_CHECKING:
    from ..batches import Batches
    from ..fitted_patch import Progress
    from ..weights import TrainedNetwork

_OF_BAND = ("coadd", "residual", "outliers", "metrics")
"""Outputs of which each band has one."""


class DeepPriorMultibandCoaddConnections(DeepPriorCoaddConnections, dimensions=("tract", "patch", "skymap")):
    """Inputs and outputs of `DeepPriorMultibandCoaddTask`: those of all bands, and a picture."""

    coadd = dataclasses.replace(DeepPriorCoaddConnections.coadd, multiple=True)
    residual = dataclasses.replace(DeepPriorCoaddConnections.residual, multiple=True)
    outliers = dataclasses.replace(DeepPriorCoaddConnections.outliers, multiple=True)
    metrics = dataclasses.replace(DeepPriorCoaddConnections.metrics, multiple=True)
    picture = Output(
        doc="Colour picture of the restored images.",
        name="deep_prior_rgb",
        storageClass="Plot",
        dimensions=("tract", "patch", "skymap"),
    )


class DeepPriorMultibandCoaddConfig(
    DeepPriorCoaddConfig, pipelineConnections=DeepPriorMultibandCoaddConnections
):
    """Configuration of `DeepPriorMultibandCoaddTask`."""

    coupling = Field[bool](
        doc="Whether the bands share their structure. Without, each band is restored as by "
        "DeepPriorCoaddTask, which is for comparisons. With it all have one target PSF, by default of half "
        "the median seeing of the visits of all bands.",
        default=True,
    )
    picture_bands = ListField[str](
        doc="The three bands that the picture shows as red, green and blue. Without any, or where one of "
        "them is missing, they are those of the longest, the middle and the shortest wavelength.",
        default=[],
        listCheck=lambda bands: len(bands) in (0, 3),
    )


class DeepPriorMultibandCoaddTask(DeepPriorCoaddTask):
    """Restore all bands of a patch together: each as `DeepPriorCoaddTask` does, with what the others show."""

    ConfigClass = DeepPriorMultibandCoaddConfig
    _DefaultName = "deepPriorMultibandCoadd"
    config: DeepPriorMultibandCoaddConfig

    def runQuantum(  # noqa: N802
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        """Read the warps of each band through handles, run, write."""
        network = self._read_network(butlerQC, inputRefs)
        warps: dict[str, Sequence[Warp]] = {}
        for band, refs in _by_band(inputRefs, self.config.warp_form).items():
            try:
                warps[band] = read_warps(butlerQC, refs, self.config, self.log)
            except NoWorkFound as err:
                self.log.warning("The %s band is left out: %s", band, err)
        checkpoints: dict[str, Path] = {}
        if self.config.checkpoint_dir:
            data_id = butlerQC.quantum.dataId
            assert data_id is not None
            parts = [data_id[name] for name in ("skymap", "tract", "patch")]
            checkpoints = {
                band: checkpoint_file(self.config.checkpoint_dir, [*parts, band, "multiband"])
                for band in warps
            }
        outputs = self.run(
            warps=warps,
            network=network,
            n_threads=butlerQC.resources.num_cores,
            memory_bytes=memory_of(butlerQC.resources),
            checkpoints=checkpoints,
        )
        results = outputs.bands
        stored = Struct(picture=outputs.picture)
        for name in _OF_BAND:
            refs_of_bands = {str(ref.dataId["band"]): ref for ref in getattr(outputRefs, name)}
            setattr(outputRefs, name, [refs_of_bands[band] for band in results])
            setattr(stored, name, [getattr(result, name) for result in results.values()])
        if self.config.psf_mode != "known":
            stored.visit_psfs = [psf for result in results.values() for psf in result.visit_psfs]
            outputRefs.visit_psfs = visit_psf_refs(stored.visit_psfs, outputRefs.visit_psfs)
        butlerQC.put(stored, outputRefs)
        for result in results.values():
            if result.checkpoint is not None:
                remove_checkpoint(result.checkpoint, self.log)

    def run(  # type: ignore[override]
        self,
        *,
        warps: Mapping[str, Sequence[Warp]],
        network: TrainedNetwork | None = None,
        n_threads: int = 1,
        memory_bytes: float | None = None,
        checkpoints: Mapping[str, Path] | None = None,
    ) -> Struct:
        """Restore all bands of a patch.

        Parameters
        ----------
        warps : `~collections.abc.Mapping` [`str`, `~collections.abc.Sequence` \
                [`~lsst.coadd.deepprior.warps.Warp`]]
            Visits of the patch, by band. They are asked for one at a time.
        network, n_threads, memory_bytes
            As those of `DeepPriorCoaddTask.run`.
        checkpoints : `~collections.abc.Mapping` [`str`, `~pathlib.Path`], optional
            Files that the fits of the bands keep their state in.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            ``bands``, of each band that has a usable pixel, in the order of wavelengths, the result of
            `DeepPriorCoaddTask.run` (`dict`), and ``picture`` (`matplotlib.figure.Figure`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if no warp of any band has a usable pixel.
        RuntimeError
            Raised as by `DeepPriorCoaddTask.run`, and if the cells of the bands differ.
        ValueError
            Raised as by `DeepPriorCoaddTask.run`.
        """
        started = time.monotonic()
        from ..colour_picture import draw_colour_picture
        from ..multiband import restore_bands
        from ..parallel import use_threads

        network = self._network_of_start(network)
        cache_bytes = self._cache_bytes(memory_bytes)
        inputs: dict[str, BandInputs] = {}
        for band in in_order(warps):
            try:
                inputs[band] = self._gather(warps[band], cache_bytes / len(warps))
            except NoWorkFound as err:
                self.log.warning("The %s band is left out: %s", band, err)
        if not inputs:
            raise NoWorkFound("No band has a warp with a usable pixel.")
        first = next(iter(inputs.values()))
        for band, one in inputs.items():
            if one.patch.cells != first.patch.cells:
                raise RuntimeError(
                    f"The cells of the {band} band are not those of the {first.band} band; ingest the warps "
                    "of all bands with the same definition of the patch."
                )
        use_threads(n_threads)
        settings, layout = self._settings(first), cell_layout(first.patch.cells)
        title = first.label.removesuffix(f", {first.band} band")
        label = f"{title}, bands {', '.join(inputs)}"
        kept: dict[str, FitCheckpoint] = {}
        if checkpoints:
            digests = {band: inputs_digest(one.observations) for band, one in inputs.items()}
            for band in inputs.keys() & checkpoints.keys():
                # The target PSF depends on the visits of all bands.
                kept[band] = open_checkpoint(
                    self.config,
                    self.log,
                    ",".join(digests.values()) if self.config.coupling else digests[band],
                    settings,
                    checkpoints[band],
                    band=band,
                    coupled_bands=",".join(inputs) if self.config.coupling else "",
                )

        def restore_on(device: str, progress: Progress, batches: Batches) -> tuple[Any, Any]:
            visits = {
                band: refined_observations(self.config, one.observations, layout, settings, device, progress)
                for band, one in inputs.items()
            }
            restorations = restore_bands(
                {band: observations for band, (observations, _) in visits.items()},
                layout,
                settings,
                coupling=self.config.coupling,
                network=network,
                device=device,
                progress=progress,
                checkpoints=kept,
                batches=batches,
            )
            return restorations, {band: refinement for band, (_, refinement) in visits.items()}

        (restorations, refinements), device = run_on_node(self.config, self.log, label, restore_on)
        results = {
            band: self._outputs(one, restorations[band], refinements[band], settings, network, device)
            for band, one in inputs.items()
        }
        seconds = time.monotonic() - started
        for band, result in results.items():
            result.checkpoint = kept[band].own_file if band in kept else None
            result.metrics["seconds"]["task"] = seconds
            coupled_with = result.metrics.setdefault("coupled_with", [])
            for coadd in (result.coadd, result.residual):
                coadd.metadata["coupled_with"] = ",".join(coupled_with)
        noise = [np.sqrt(np.nanmedian(result.residual.variance.array)) for result in results.values()]
        picture = draw_colour_picture(
            title,
            {band: result.coadd.image.array for band, result in results.items()},
            float(np.median(noise)),
            list(self.config.picture_bands),
        )
        self.metadata["n_warps_used"] = sum(len(one.infos) for one in inputs.values())
        self.metadata["n_warps_left_out"] = sum(len(one.left_out) for one in inputs.values())
        self.metadata["gpu_peak_bytes"] = gpu_peak_bytes(device)
        self.log.info("%s: restored in %.0f s.", label, seconds)
        return Struct(bands=results, picture=picture)


def _by_band(inputs: InputQuantizedConnection, warp_form: str) -> dict[str, InputQuantizedConnection]:
    """Return the inputs of a quantum with the warps of one band each."""
    name = "direct_warps" if warp_form == "exposure" else "warps"
    warps: dict[str, list[Any]] = {}
    for ref in getattr(inputs, name):
        warps.setdefault(str(ref.dataId["band"]), []).append(ref)
    result = {}
    for band, refs in warps.items():
        result[band] = copy.copy(inputs)
        setattr(result[band], name, refs)
    return result
