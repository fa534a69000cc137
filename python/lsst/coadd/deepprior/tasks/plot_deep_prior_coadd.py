# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The task that draws the figure of a restored patch."""

from __future__ import annotations

__all__ = ("PlotDeepPriorCoaddConfig", "PlotDeepPriorCoaddConnections", "PlotDeepPriorCoaddTask")

from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.table import Table
from scipy.spatial import KDTree

from lsst.images.cells import CellCoadd
from lsst.pipe.base import (
    InputQuantizedConnection,
    OutputQuantizedConnection,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Input, Output

from ..direct_warps import PatchGeometry, warp_from_exposure
from ..plain_coadd import Coadd
from ..psf import fwhm
from ..warp_streams import WarpHandles
from ..warps import Warp
from .direct_warp_inputs import WarpFormConfig
from .geometry import plain_coadd, psf_stamps

_AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""


class PlotDeepPriorCoaddConnections(PipelineTaskConnections, dimensions=("tract", "patch", "band", "skymap")):
    """Inputs and outputs of `PlotDeepPriorCoaddTask`."""

    coadd = Input(
        doc="The restored image.",
        name="deep_prior_coadd",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    residual = Input(
        doc="Coadd of data minus model.",
        name="deep_prior_residual",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    sources = Input(
        doc="Sources of the patch.",
        name="deep_prior_coadd_sources",
        storageClass="ArrowAstropy",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    metrics = Input(
        doc="Numbers of the restoration.",
        name="deep_prior_coadd_metrics",
        storageClass="StructuredDataDict",
        dimensions=("tract", "patch", "band", "skymap"),
    )
    warps = Input(
        doc="Visits of the patch, of which only that of the best seeing is read.",
        name="deep_prior_warp",
        storageClass="CellCoadd",
        dimensions=("tract", "patch", "skymap", "visit", "instrument"),
        multiple=True,
        deferLoad=True,
    )
    direct_warps = Input(
        doc="The same with warp_form = 'exposure'.",
        name="direct_warp",
        storageClass="ExposureF",
        dimensions=("tract", "patch", "skymap", "visit", "instrument"),
        multiple=True,
        deferLoad=True,
    )
    plot = Output(
        doc="Figure of plain coadd, best exposure, restored image, residual, PSFs and fit.",
        name="deep_prior_coadd_plot",
        storageClass="Plot",
        dimensions=("tract", "patch", "band", "skymap"),
    )

    def __init__(self, *, config: PlotDeepPriorCoaddConfig) -> None:
        if config.warp_form == "exposure":
            del self.warps
        else:
            del self.direct_warps


class PlotDeepPriorCoaddConfig(
    WarpFormConfig, PipelineTaskConfig, pipelineConnections=PlotDeepPriorCoaddConnections
):
    """Configuration of `PlotDeepPriorCoaddTask`."""


class PlotDeepPriorCoaddTask(PipelineTask):
    """Draw the figure of a restored patch."""

    ConfigClass = PlotDeepPriorCoaddConfig
    _DefaultName = "plotDeepPriorCoadd"
    config: PlotDeepPriorCoaddConfig

    def runQuantum(  # noqa: N802
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        """Read the warp with the best seeing and everything else, run, write."""
        inputs = butlerQC.get(inputRefs)
        best = best_visit(inputs["metrics"])
        coadd = inputs["coadd"]
        geometry = self._warp_geometry(coadd)
        exposures = self.config.warp_form == "exposure"
        chosen = [
            handle
            for handle in inputs.pop("direct_warps" if exposures else "warps")
            if (handle.dataId["instrument"], handle.dataId["visit"]) == (best["instrument"], best["visit"])
        ]
        if not chosen:
            raise RuntimeError(
                f"The warp of {best['instrument']} visit {best['visit']}, which the figure shows, is not "
                "among the inputs; name its collection, and leave out no visit that was restored."
            )
        if exposures:
            (warp,) = WarpHandles(chosen, lambda one: warp_from_exposure(one.get(), one.dataId, geometry))
        else:
            (warp,) = WarpHandles(chosen)
        butlerQC.put(self.run(best_warp=self._shown_warp(warp), **inputs), outputRefs)

    def _warp_geometry(self, coadd: CellCoadd) -> PatchGeometry:
        """Return where the patch lies in the pixels of the warps."""
        return PatchGeometry(patch=coadd.patch, sky_projection=coadd.sky_projection)

    def _shown_warp(self, warp: Warp) -> Warp:
        """Return a warp in the pixels of the coadd."""
        return warp

    def run(
        self,
        *,
        coadd: CellCoadd,
        residual: CellCoadd,
        sources: Table,
        metrics: Mapping[str, Any],
        best_warp: Warp,
    ) -> Struct:
        """Draw the figure.

        Parameters
        ----------
        coadd : `lsst.images.cells.CellCoadd`
            The restored image of the patch.
        residual : `lsst.images.cells.CellCoadd`
            Coadd of data minus model of the same patch.
        sources : `astropy.table.Table`
            Its sources.
        metrics : `~collections.abc.Mapping`
            Numbers of the restoration.
        best_warp : `~lsst.coadd.deepprior.warps.Warp`
            The visit of the best seeing.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            ``plot`` (`matplotlib.figure.Figure`).
        """
        from ..figure import FigureInputs, draw_figure

        data, _ = plain_coadd(coadd, residual)
        visit = np.full(data.shape, np.nan)
        visit[best_warp.bbox.slice_within(coadd.bbox)] = best_warp.image
        psfs = (
            _typical_stamp(data.psf),
            _typical_stamp(best_warp.psf_stamps),
            _typical_stamp(psf_stamps(coadd)),
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            sigmas = residual.image.array / np.sqrt(residual.variance.array)
        inputs = FigureInputs(
            title=f"Tract {coadd.tract}, patch {coadd.patch.id}, {coadd.band} band",
            coadd=np.where(data.good, data.image, np.nan),
            visit=visit,
            restored=np.where(coadd.mask.get("NO_DATA"), np.nan, coadd.image.array),
            visit_name=f"visit {best_warp.visit}",
            residual=sigmas,
            noise=float(np.sqrt(np.median(residual.variance.array[data.good]))),
            psfs=psfs,
            fwhm=(fwhm(psfs[0]), fwhm(psfs[1]), fwhm(psfs[2])),
            sources=sources,
            origin=(coadd.bbox.y.start, coadd.bbox.x.start),
            pixel_scale=metrics["pixel_scale_arcsec"],
            curves=metrics["curves"],
            facts=_facts(metrics, sources, data),
        )
        return Struct(plot=draw_figure(inputs))


def best_visit(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Choose the visit with the narrowest PSF of those that show nearly all that any visit shows.

    Parameters
    ----------
    metrics : `~collections.abc.Mapping`
        Numbers of a restoration.

    Returns
    -------
    visit : `~collections.abc.Mapping`
        Its entry of ``metrics["visits"]``.
    """
    visits = metrics["visits"]
    most = max(visit["good_fraction"] for visit in visits)
    covering = (visit for visit in visits if visit["good_fraction"] >= 0.9 * most)
    return min(covering, key=lambda visit: visit["fwhm_pixels"])


def _typical_stamp(stamps: np.ndarray) -> np.ndarray:
    """Return the PSF of the middle one of the cells that have one."""
    cells = np.argwhere(np.isfinite(stamps[:, :, 0, 0]))
    return stamps[tuple(cells[len(cells) // 2])]


def _facts(metrics: Mapping[str, Any], sources: Table, data: Coadd) -> dict[str, str]:
    """Put the numbers that matter most into words."""
    scale = metrics["pixel_scale_arcsec"]
    seeing = sorted(visit["fwhm_pixels"] * scale for visit in metrics["visits"])
    point_error = 1.0 / np.sqrt(np.median(data.information[data.good]))
    depth = _AB_ZERO_POINT - 2.5 * np.log10(5.0 * point_error)
    positions = KDTree(np.stack([sources["x"], sources["y"]], axis=1))
    n_pairs = len(positions.query_pairs(np.nanmedian(data.fwhm)))
    noise = metrics["noise"]
    return {
        "Visits": str(len(seeing)),
        "Seeing, best to worst": f"{seeing[0]:.2f}\u2033 to {seeing[-1]:.2f}\u2033",
        "Depth (5\u03c3, point source)": f"{depth:.2f} mag",
        "Sources": str(len(sources)),
        "Pairs within the coadd's FWHM": str(n_pairs),
        "Sky noise, restored / coadd": f"{noise['restored_sigma_nJy'] / noise['coadd_sigma_nJy']:.2f}",
        "Residual: \u03c7\u00b2 per pixel": f"{metrics['residual']['chi2_per_pixel']:.3f}",
        "Pixels with an outlier": f"{100.0 * metrics['residual']['clipped_fraction']:.1f} %",
        "Method": metrics["method"],
        "Time": f"{metrics['seconds']['task']:.0f} s",
    }
