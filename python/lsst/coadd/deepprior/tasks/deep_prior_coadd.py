# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that restores a patch."""

from __future__ import annotations

__all__ = ("BandInputs", "DeepPriorCoaddTask", "visit_psf_refs")

import dataclasses
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsst.coadd.deepprior import __version__
from lsst.daf.butler import DatasetRef
from lsst.images import SkyProjection
from lsst.images.cells import CellCoadd, CellGrid, PatchDefinition
from lsst.pipe.base import (
    InputQuantizedConnection,
    NoWorkFound,
    OutputQuantizedConnection,
    PipelineTask,
    QuantumContext,
    Struct,
)

from ..coadd import InputPlanes, make_coadds, mask_shares
from ..fit_checkpoint import checkpoint_file, remove_checkpoint
from ..job_directories import job_directory
from ..network_dataset import network_from_dataset
from ..progress import counted
from ..psf import FWHM_PER_SIGMA
from ..refined_psfs import refined_visits
from ..warp_streams import WarpObservations, cell_layout, default_cache_bytes
from ..warps import Warp, WarpInfo
from .deep_prior_coadd_config import DeepPriorCoaddConfig
from .direct_warp_inputs import read_warps
from .execution import gpu_peak_bytes, memory_of, restore_on_node
from .geometry import pixel_scale, pixel_to_sky

if TYPE_CHECKING:
    from ..fitted_patch import RestoreSettings
    from ..psf_refinement import PsfRefinement
    from ..restore import Restoration
    from ..weights import TrainedNetwork

_POOR_CHI2 = 2.0
"""Mean square of data minus model, in units of the noise, above which there is a warning; 1 is expected."""


def _describe(cells: CellGrid) -> str:
    """Put a grid of cells into words."""
    return f"of {cells.cell_shape.x}x{cells.cell_shape.y} pixels in {cells.bbox}"


def visit_psf_refs(psfs: Sequence[CellCoadd], refs: Sequence[DatasetRef]) -> list[DatasetRef]:
    """Return the references of PSFs of visits; visits that were left out have none."""
    by_visit = {(ref.dataId["instrument"], ref.dataId["visit"]): ref for ref in refs}
    visits = [tuple(psf.provenance.inputs[0][["instrument", "visit"]]) for psf in psfs]
    return [by_visit[str(instrument), int(visit)] for instrument, visit in visits]


@dataclasses.dataclass(frozen=True, eq=False)
class BandInputs:
    """The warps of a patch and band, read once."""

    observations: WarpObservations
    infos: list[WarpInfo]
    left_out: list[str]
    planes: InputPlanes
    band: str
    sky_projection: SkyProjection
    label: str
    """What messages call the patch and band."""
    seconds: float
    """Time that reading took."""

    @property
    def patch(self) -> PatchDefinition:
        """The patch (`lsst.images.cells.PatchDefinition`)."""
        return self.planes.patch

    @property
    def pixel_scale(self) -> float:
        """Size of a pixel in arcsec (`float`)."""
        return pixel_scale(self.sky_projection, self.patch.cells.bbox)


class DeepPriorCoaddTask(PipelineTask):
    """Restore a patch from its warps: one image, at a known narrow PSF, and the residual that audits it."""

    ConfigClass = DeepPriorCoaddConfig
    _DefaultName = "deepPriorCoadd"
    config: DeepPriorCoaddConfig

    def runQuantum(  # noqa: N802
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        """Read through handles, run, write."""
        network = self._read_network(butlerQC, inputRefs)
        checkpoint = None
        if self.config.checkpoint_dir:
            data_id = outputRefs.coadd.dataId
            parts = [data_id[name] for name in ("skymap", "tract", "patch", "band")]
            checkpoint = checkpoint_file(self.config.checkpoint_dir, parts)
        outputs = self.run(
            warps=read_warps(butlerQC, inputRefs, self.config, self.log),
            network=network,
            n_threads=butlerQC.resources.num_cores,
            memory_bytes=memory_of(butlerQC.resources),
            checkpoint=checkpoint,
        )
        if self.config.psf_mode != "known":
            outputRefs.visit_psfs = visit_psf_refs(outputs.visit_psfs, outputRefs.visit_psfs)
        butlerQC.put(outputs, outputRefs)
        if outputs.checkpoint is not None:
            remove_checkpoint(outputs.checkpoint, self.log)

    def _read_network(
        self, butlerQC: QuantumContext, inputRefs: InputQuantizedConnection
    ) -> TrainedNetwork | None:
        """Read the network of the input collections, if that is to be used."""
        if not self.config.network_from_butler:
            return None
        try:
            return network_from_dataset(butlerQC.get(inputRefs.network))
        except Exception as err:
            raise RuntimeError(f"The network {inputRefs.network} cannot be used: {err}") from err

    def run(
        self,
        *,
        warps: Sequence[Warp],
        network: TrainedNetwork | None = None,
        n_threads: int = 1,
        memory_bytes: float | None = None,
        checkpoint: Path | None = None,
    ) -> Struct:
        """Restore a patch.

        Parameters
        ----------
        warps : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.warps.Warp`]
            Visits of one patch and band. They are asked for one at a time, those that do not fit in the cache
            several times.
        network : `~lsst.coadd.deepprior.weights.TrainedNetwork`, optional
            What the pretrained start uses instead of the network that comes with the package.
        n_threads : `int`, optional
            Number of threads to compute with on the CPU.
        memory_bytes : `float`, optional
            Memory that the task may take, where it is less than that of the machine.
        checkpoint : `~pathlib.Path`, optional
            File that a fit keeps its state in, and goes on from if it is there.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            ``coadd``, ``residual`` (`lsst.images.cells.CellCoadd`), ``outliers`` (`astropy.table.Table`),
            ``metrics`` (`dict`), ``visit_psfs``, the PSFs that were learned (`list`
            [`lsst.images.cells.CellCoadd`], empty with ``psf_mode = "known"``), and ``checkpoint``, the file
            of this name if the fit has read or written it (`~pathlib.Path` or `None`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if no warp has a usable pixel.
        RuntimeError
            Raised if a warp cannot be used or has other cells than those before it, no GPU is found where one
            is asked for, or its memory does not suffice and the CPU may not be used, the network that comes
            with the package is missing or damaged, the checkpoint is of other inputs or settings, or its
            directory or that of the cache cannot be used.
        ValueError
            Raised if the target PSF that is asked for cannot be made of the PSFs of the visits, or one of
            these is flat.
        """
        started = time.monotonic()
        from ..parallel import use_threads

        network = self._network_of_start(network)
        inputs = self._gather(warps, self._cache_bytes(memory_bytes))
        use_threads(n_threads)
        settings = self._settings(inputs)
        restoration, refinement, device, own_checkpoint = restore_on_node(
            self.config,
            self.log,
            inputs.label,
            inputs.observations,
            cell_layout(inputs.patch.cells),
            settings,
            network,
            checkpoint,
        )
        result = self._outputs(inputs, restoration, refinement, settings, network, device)
        result.checkpoint = own_checkpoint
        result.metrics["seconds"]["task"] = time.monotonic() - started
        self.metadata["n_warps_used"] = len(inputs.infos)
        self.metadata["n_warps_left_out"] = len(inputs.left_out)
        self.metadata["gpu_peak_bytes"] = gpu_peak_bytes(device)
        self.log.info("%s: restored in %.0f s.", inputs.label, result.metrics["seconds"]["task"])
        return result

    def _network_of_start(self, network: TrainedNetwork | None) -> TrainedNetwork | None:
        """Return the network that the configured start takes: the one given, or that of the package."""
        if self.config.init == "scratch":
            return None
        return self._packaged_network() if network is None else network

    def _cache_bytes(self, memory_bytes: float | None) -> float:
        """Return how much of the pixels of warps is kept in memory."""
        gib = self.config.cache_gib
        return default_cache_bytes(memory_bytes) if gib is None else gib * 2**30

    def _gather(self, warps: Sequence[Warp], cache_bytes: float) -> BandInputs:
        """Read the warps of a band once."""
        started = time.monotonic()
        directory = self.config.cache_dir
        observations = WarpObservations(
            warps,
            self.config.bad_mask_planes,
            cache_bytes,
            job_directory("cache_dir", directory) if directory else None,
        )
        infos: list[WarpInfo] = []
        left_out: list[str] = []
        planes: InputPlanes | None = None
        for index, warp in enumerate(warps):
            observation = warp.observation(self.config.bad_mask_planes)
            if not observation.good.any():
                self.log.warning("%s has no usable pixel in the patch and is left out.", warp.label)
                left_out.append(warp.label)
                continue
            if planes is None:
                planes = InputPlanes(warp.patch)
                band, sky_projection = warp.band, warp.sky_projection
            if warp.patch.cells != planes.patch.cells:
                raise RuntimeError(
                    f"The cells of {warp.label}, {_describe(warp.patch.cells)}, are not those of "
                    f"{infos[0].label}, {_describe(planes.patch.cells)}; ingest all warps of a patch with "
                    "the same definition of the patch."
                )
            planes.add(warp, self.config.bad_mask_planes)
            infos.append(warp.info)
            observations.add(index, observation)
        if planes is None:
            raise NoWorkFound(f"None of the {len(warps)} warps has a usable pixel.")
        frame = sky_projection.pixel_frame
        label = f"tract {frame.tract}, patch {planes.patch.id}, {band} band"
        self.log.info("%s: restoring from %d of %d warps.", label, len(infos), len(warps))
        return BandInputs(
            observations, infos, left_out, planes, band, sky_projection, label, time.monotonic() - started
        )

    def _settings(self, inputs: BandInputs) -> RestoreSettings:
        """Return the numerical settings for a patch."""
        from ..fitted_patch import RestoreSettings

        target_fwhm = self.config.target_fwhm_pixels
        if self.config.target_fwhm_arcsec is not None:
            target_fwhm = self.config.target_fwhm_arcsec / inputs.pixel_scale
        same = {field.name for field in dataclasses.fields(RestoreSettings)} - {"target_fwhm"}
        return RestoreSettings(target_fwhm=target_fwhm, **{name: getattr(self.config, name) for name in same})

    def _outputs(
        self,
        inputs: BandInputs,
        restoration: Restoration,
        refinement: PsfRefinement | None,
        settings: RestoreSettings,
        network: TrainedNetwork | None,
        device: str,
    ) -> Struct:
        """Make the datasets of a restored band."""
        from ..outliers import outlier_table

        inputs.observations.release()
        patch, sky_projection, scale = inputs.patch, inputs.sky_projection, inputs.pixel_scale
        infos = inputs.infos
        start = self._describe_start(network, restoration, inputs.label)
        if (chi2 := restoration.metrics["residual"]["chi2_per_pixel"]) > _POOR_CHI2:
            self.log.warning(
                "%s: data minus model are %.3g times the noise, squared (1 is expected); PSFs, variances or "
                "masks of visits are wrong, or the image is. Look at the residual coadd before you use it.",
                inputs.label,
                chi2,
            )
        metadata = {
            "deepprior_version": __version__,
            "lsst_images_version": version("lsst-images"),
            "torch_version": version("torch"),
            "method": restoration.metrics["method"],
            **start,
            "device": device,
            "bad_mask_planes": ",".join(self.config.bad_mask_planes),
            "target_fwhm_arcsec": restoration.target_sigma * FWHM_PER_SIGMA * scale,
            **{name: value for name, value in dataclasses.asdict(settings).items() if value is not None},
        }
        visit_psfs: list[CellCoadd] = []
        if refinement is not None:
            metadata["psf_mode"] = self.config.psf_mode
            infos, visit_psfs = refined_visits(infos, refinement, patch, sky_projection, metadata)
        coadd, residual = make_coadds(
            restoration,
            infos,
            inputs.planes,
            sky_projection=sky_projection,
            band=inputs.band,
            min_visits=self.config.min_visits,
            metadata=metadata,
        )
        start_pixel = coadd.bbox.y.start, coadd.bbox.x.start
        outliers = outlier_table(restoration.outliers, infos, start_pixel, pixel_to_sky(sky_projection))
        fwhm = restoration.metrics["psf"]["visit_fwhm_pixels"]
        metrics: dict[str, Any] = restoration.metrics | {
            "network": restoration.metrics["network"] | start,
            "curves": restoration.curves,
            "pixel_scale_arcsec": scale,
            "visits": [
                {
                    "instrument": info.instrument,
                    "visit": info.visit,
                    "fwhm_pixels": fwhm[info.label],
                    "good_fraction": float(good.mean()),
                }
                for info, good in zip(infos, restoration.cell_good_fraction, strict=True)
            ],
            "left_out": inputs.left_out,
            "mask_fractions": mask_shares(coadd),
        }
        if refinement is not None:
            metrics["psf_refinement"] = self._describe_refinement(refinement, infos, inputs.label)
            metrics["seconds"]["refine"] = refinement.seconds
        metrics["seconds"]["input"] = inputs.seconds
        return Struct(
            coadd=coadd, residual=residual, outliers=outliers, metrics=metrics, visit_psfs=visit_psfs
        )

    def _packaged_network(self) -> TrainedNetwork:
        """Read the network that comes with the package."""
        from ..weights import InvalidNetworkError, packaged_network

        try:
            return packaged_network()
        except InvalidNetworkError as err:
            raise RuntimeError(f"{err} The configuration init = 'scratch' needs no network.") from err

    def _describe_refinement(
        self, refinement: PsfRefinement, infos: Sequence[WarpInfo], label: str
    ) -> dict[str, Any]:
        """Return the numbers of the PSFs that were learned, and warn where stars are missing."""
        from ..psf_refinement import summary
        from ..psf_sky import MIN_STARS

        numbers = summary(refinement, [info.label for info in infos])
        if not refinement.anchored:
            self.log.warning(
                "%s: of %s fewer than %d are stars of one shape, which would tell what the PSFs of all "
                "visits have in common; only how they differ was refined.",
                label,
                counted(numbers["n_candidates"], "bright point", "bright points"),
                MIN_STARS,
            )
        return numbers

    def _describe_start(
        self, network: TrainedNetwork | None, restoration: Restoration, label: str
    ) -> dict[str, str]:
        """Say which start was taken and with which network, and warn where it is not the one asked for."""
        metrics = restoration.metrics
        outside = metrics["network"]["outside"]
        if network is not None and not outside:
            return {
                "init": "pretrained",
                "network_name": network.name,
                "network_version": network.version,
                "network_sha256": network.sha256,
            }
        if network is not None:
            for message in outside:
                self.log.warning(
                    "%s: outside of what the network %s was trained on: %s.", label, network.name, message
                )
            self.log.warning(
                "%s: restored without the network %s; %s.", label, network.name, metrics["method"]
            )
        failed = metrics["method"].startswith("maximum likelihood")
        if network is None and restoration.curves["fit_step"] and failed:
            self.log.warning(
                "%s: %s. Look for visits whose sky, PSF or variance is wrong.", label, metrics["method"]
            )
        return {"init": "scratch" if restoration.curves["fit_step"] and not failed else "none"}
