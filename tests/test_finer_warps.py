# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Warps, patches and tasks on finer pixels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick
from matplotlib.figure import Figure

import lsst.pipe.base.testUtils
from lsst.coadd.deepprior.finer import finer_observation, repeated
from lsst.coadd.deepprior.finer_warps import (
    FinerWarps,
    coarser_geometry,
    finer_box,
    finer_patch,
    finer_projection,
    finer_skymap,
    finer_warp,
    normal_skymap,
)
from lsst.coadd.deepprior.noise_correlation import noise_correlation
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import fit_star, gaussian_stamp
from lsst.coadd.deepprior.resampling import Resampling
from lsst.coadd.deepprior.tasks.finer_deep_prior_coadd import (
    FinerDeepPriorCoaddConfig,
    FinerDeepPriorCoaddConnections,
    FinerDeepPriorCoaddTask,
)
from lsst.coadd.deepprior.tasks.finer_plot_deep_prior_coadd import (
    FinerPlotDeepPriorCoaddConfig,
    FinerPlotDeepPriorCoaddConnections,
    FinerPlotDeepPriorCoaddTask,
)
from lsst.coadd.deepprior.tasks.geometry import plain_coadd
from lsst.coadd.deepprior.tasks.measure_deep_prior_coadd import MeasureDeepPriorCoaddTask
from lsst.coadd.deepprior.tasks.plot_deep_prior_coadd import best_visit
from lsst.coadd.deepprior.warps import Warp
from lsst.images import XY, YX, Box, SkyProjection, TractFrame, Transform
from lsst.images.cells import CellCoadd
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import NoWorkFound, Struct

QUICK = quick.QUICK | {"check_psf": False}


@pytest.fixture(scope="module", params=[2, 3])
def restored(request: pytest.FixtureRequest, warps: list[Warp]) -> Struct:
    config = FinerDeepPriorCoaddConfig()
    config.update(oversampling=request.param, **QUICK)
    return FinerDeepPriorCoaddTask(config=config).run(warps=warps)


def test_names_of_skymaps() -> None:
    assert finer_skymap("deepprior", 2) == "deepprior_x2"
    assert normal_skymap("a_x2_b_x3", 3) == "a_x2_b"
    for other in ("deepprior", "deepprior_x3", "_x2", "deepprior_x22"):
        assert normal_skymap(other, 2) is None
    with pytest.raises(ValueError, match="finer pixels already"):
        finer_skymap("deepprior_x2", 3)
    with pytest.raises(ValueError, match="must be 2 or 3"):
        finer_skymap("deepprior", 5)


@pytest.mark.parametrize("oversampling", [2, 3])
def test_projection_is_the_same_on_the_sky(warps: list[Warp], oversampling: int) -> None:
    """Corners of pixels stay corners, at an origin far from 0 and with an odd or even factor."""
    k, warp = oversampling, warps[0]
    finer = finer_projection(warp.sky_projection, k)
    assert finer.pixel_frame == TractFrame(
        skymap=f"deepprior_sim_x{k}", tract=9, bbox=finer_box(warp.sky_projection.pixel_frame.bbox, k)
    )
    x, y = np.array([15600.0, 15623.25, -0.5]), np.array([14200.0, 14277.9, -0.5])
    there = warp.sky_projection.pixel_to_sky(XY(x=x, y=y))
    here = finer.pixel_to_sky(XY(x=k * x + 0.5 * (k - 1), y=k * y + 0.5 * (k - 1)))
    assert there.separation(here).arcsec.max() < 1e-7
    back = finer.sky_to_pixel(there)
    np.testing.assert_allclose(back.x, k * x + 0.5 * (k - 1), atol=1e-6)
    # The lower left corner of pixel 0 is that of fine pixel 0.
    np.testing.assert_allclose((back.x[2], back.y[2]), -0.5, atol=1e-6)
    box = finer_patch(warp.patch, k).cells.bbox
    wcs = finer.as_fits_wcs(box)
    sky = wcs.pixel_to_world(k * x[0] + 0.5 * (k - 1) - box.x.start, k * y[0] + 0.5 * (k - 1) - box.y.start)
    assert sky.separation(there[0]).arcsec < 1e-6
    # Only projections that are sets of frames can be carried to afw.
    assert finer.show().split()[:2] == warp.sky_projection.show().split()[:2] == ["Begin", "FrameSet"]
    named = finer_projection(warp.sky_projection, k, "another")
    assert named.pixel_frame.skymap == "another"


def test_projection_keeps_its_approximation(warps: list[Warp]) -> None:
    exact = warps[0].sky_projection
    matrix = np.array([[1.0, 0.0, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    near = Transform.affine(exact.pixel_frame, exact.pixel_frame, matrix).then(exact.pixel_to_sky_transform)
    finer = finer_projection(SkyProjection(exact.pixel_to_sky_transform, near), 2)
    assert finer.fits_approximation is not None
    distance = finer.pixel_to_sky(x=31200.0, y=28400.0).separation(
        finer.fits_approximation.pixel_to_sky(x=31200.0, y=28400.0)
    )
    assert distance.arcsec == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("oversampling", [2, 3])
def test_patch_and_back(warps: list[Warp], oversampling: int) -> None:
    warp = warps[0]
    patch = finer_patch(warp.patch, oversampling)
    assert patch.cells.grid_size == warp.patch.cells.grid_size
    assert patch.cells.cell_shape == YX(y=40 * oversampling, x=36 * oversampling)
    assert (patch.id, patch.index) == (warp.patch.id, warp.patch.index)
    projection = finer_projection(warp.sky_projection, oversampling)
    back = coarser_geometry(patch, projection, oversampling)
    assert back.patch == warp.patch
    assert back.sky_projection.pixel_frame == warp.sky_projection.pixel_frame
    one, other = (p.pixel_to_sky(x=15610.3, y=14250.7) for p in (back.sky_projection, warp.sky_projection))
    assert one.separation(other).arcsec < 1e-7
    with pytest.raises(ValueError, match="not 2 times finer"):
        coarser_geometry(warp.patch, warp.sky_projection, 2)
    with pytest.raises(ValueError, match="not a whole number"):
        coarser_geometry(finer_patch(warp.patch, 2), finer_projection(warp.sky_projection, 3), 3)


@pytest.mark.parametrize("oversampling", [2, 3])
def test_warp_is_the_same_on_the_sky(warps: list[Warp], oversampling: int) -> None:
    k = oversampling
    warp = next(warp for warp in warps if warp.bbox != warp.patch.outer_bbox)
    finer = finer_warp(warp, k)
    assert finer.bbox == finer_box(warp.bbox, k)
    assert (finer.label, finer.band, finer.day_obs) == (warp.label, warp.band, warp.day_obs)
    blocks = finer.image.reshape(warp.image.shape[0], k, warp.image.shape[1], k).sum(axis=(1, 3))
    np.testing.assert_allclose(blocks, warp.image, rtol=1e-5)
    np.testing.assert_allclose(finer.variance[1::k, 1::k] * k**4, warp.variance, rtol=1e-5)
    for plane in ("SAT", "CR", "BAD"):
        assert finer.mask.get(plane).sum() == k**2 * warp.mask.get(plane).sum()
        np.testing.assert_array_equal(finer.mask.get(plane)[::k, ::k], warp.mask.get(plane))
    (outline,) = finer.info.detectors.values()
    assert outline.bbox == finer.bbox
    shapes = finer.info.psf_shapes / k**2 - warp.info.psf_shapes
    assert np.abs(shapes).max() < 0.15
    expected = finer_observation(warp.observation(["SAT", "CR"]), k)
    observation = finer.observation(["SAT", "CR"])
    for name in ("flux", "variance", "good", "psf"):
        np.testing.assert_array_equal(getattr(observation, name), getattr(expected, name))
    assert (observation.origin, observation.sampling) == (expected.origin, k)
    assert observation.origin == (finer.bbox.y.start - k * 14200, finer.bbox.x.start - k * 15600)
    again = FinerWarps(warps, k)
    assert len(again) == len(warps)
    assert again[1].bbox == finer_box(warps[1].bbox, k)
    with pytest.raises(ValueError, match="must be 2 or 3"):
        FinerWarps(warps, 4)


def test_coadds_are_on_finer_pixels(restored: Struct, warps: list[Warp], tmp_path: Path) -> None:
    k = restored.metrics["oversampling"]
    patch = finer_patch(warps[0].patch, k)
    assert restored.metrics["pixel_scale_arcsec"] == pytest.approx(0.2 / k, rel=1e-5)
    for name in ("coadd", "residual"):
        coadd = getattr(restored, name)
        assert coadd.bbox == patch.cells.bbox
        assert coadd.patch == patch
        assert coadd.metadata["oversampling"] == k
        assert coadd.sky_projection.pixel_frame.skymap == f"deepprior_sim_x{k}"
        coadd.write(tmp_path / f"{name}.fits")
        back = CellCoadd.read(tmp_path / f"{name}.fits")
        assert back.sky_projection == coadd.sky_projection
        assert {row["visit"] for row in back.provenance.inputs} <= {warp.visit for warp in warps}
    coadd, residual = restored.coadd, restored.residual
    # Every pixel of the visits is a block: no plane and no image has gaps between the fine pixels for it.
    for image in (coadd.mask.get("NO_DATA"), np.isfinite(residual.image.array)):
        blocks = image.reshape(80, k, 108, k)
        assert np.array_equal(blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3)))
    assert np.isfinite(coadd.variance.array[~coadd.mask.get("NO_DATA")]).all()
    assert np.isfinite(coadd.image.array).all()
    psf = next(residual.psf[cell].array for cell in residual.psf.bounds.cell_indices())
    fit = fit_star(psf.astype(float), radius=9)
    assert fit.x == pytest.approx(psf.shape[0] // 2, abs=0.05)


def test_sources_are_where_they_are(restored: Struct, warps: list[Warp]) -> None:
    from lsst.coadd.deepprior.simulate import Scene, SceneConfig

    truth = Scene(SceneConfig(seed=5, n_cells=(2, 3), cell_shape=(40, 36), n_visits=4, psf_size=21))
    catalogue = truth.catalogue("r")
    sources = MeasureDeepPriorCoaddTask().run(coadd=restored.coadd, residual=restored.residual).sources
    k = restored.metrics["oversampling"]
    inside = (np.abs(catalogue["x"] - 15653.5) < 44) & (np.abs(catalogue["y"] - 14239.5) < 30)
    bright = catalogue[inside & (catalogue["mag"] < 23.0) & (catalogue["pair_id"] < 0)]
    assert len(bright) > 0
    for row in bright:
        x, y = k * row["x"] + 0.5 * (k - 1), k * row["y"] + 0.5 * (k - 1)
        distance = np.hypot(sources["x"] - x, sources["y"] - y)
        nearest = sources[int(np.argmin(distance))]
        assert distance.min() < 0.5 * k
        assert nearest["flux"] == pytest.approx(row["flux_nJy"], rel=0.1)
        cos = np.cos(np.radians(row["dec"]))
        offset = np.hypot((nearest["ra"] - row["ra"]) * cos, nearest["dec"] - row["dec"]) * 3600.0
        assert offset < 0.1


def test_noise_of_the_coadd_is_that_of_the_pixels_of_the_warps(restored: Struct) -> None:
    """The noise realisations are replaced by resampled noise, whose pixels are blocks on the finer grid."""
    k = restored.metrics["oversampling"]
    coadd, residual = copy.deepcopy(restored.coadd), copy.deepcopy(restored.residual)
    coadd.noise_realizations[0].array[...] = 0.0
    good = np.isfinite(residual.image.array)
    residual.variance.array[good] = 1.0
    resampling = Resampling((80, 108), "lanczos3", shift=(0.5, 0.5))
    noise = resampling.image(np.random.default_rng(9).standard_normal(resampling.detector_shape))
    noise /= np.sqrt(resampling.variance(np.ones(resampling.detector_shape)))
    residual.noise_realizations[0].array[...] = repeated(noise, k)
    plain, _ = plain_coadd(coadd, residual)
    own = noise_correlation(noise, good[::k, ::k])
    white = Coadd(np.zeros((9, 9)), 1.0, np.zeros((9, 9)), np.ones((9, 9)), gaussian_stamp(1.5)[None, None])
    weights = gaussian_stamp(1.5, 13)
    # The k^2 pixels of a block are one measurement.
    expected = k**2 * white.correlated(own).noise_excess(weights)
    assert plain.noise_excess(repeated(weights, k)) == pytest.approx(expected, rel=0.05)


def test_figure(restored: Struct, warps: list[Warp]) -> None:
    k = restored.metrics["oversampling"]
    task = FinerPlotDeepPriorCoaddTask(config=FinerPlotDeepPriorCoaddConfig(oversampling=k))
    geometry = task._warp_geometry(restored.coadd)
    assert geometry.patch == warps[0].patch
    best = next(warp for warp in warps if warp.visit == best_visit(restored.metrics)["visit"])
    sources = MeasureDeepPriorCoaddTask().run(coadd=restored.coadd, residual=restored.residual).sources
    result = task.run(
        coadd=restored.coadd,
        residual=restored.residual,
        sources=sources,
        metrics=restored.metrics,
        best_warp=task._shown_warp(best),
    )
    assert isinstance(result.plot, Figure)


@pytest.mark.parametrize("connections", [FinerDeepPriorCoaddConnections, FinerPlotDeepPriorCoaddConnections])
def test_connections(connections: type) -> None:
    lsst.pipe.base.testUtils.lintConnections(connections)


def test_all_inputs_of_warps_are_looked_up() -> None:
    config = FinerDeepPriorCoaddConfig()
    config.update(
        warp_form="exposure",
        select_visits=True,
        use_artifact_masks=True,
        max_masked_fraction=0.5,
        n_noise_warps=2,
    )
    connections = FinerDeepPriorCoaddConnections(config=config)
    assert connections.inputs == {"finer_skymap"}
    assert connections.prerequisiteInputs == {
        "direct_warps",
        "sky_map",
        "selected_visits",
        "artifact_masks",
        "masked_fractions",
        "noise0_warps",
        "noise1_warps",
    }
    plot = FinerPlotDeepPriorCoaddConnections(config=FinerPlotDeepPriorCoaddConfig())
    assert plot.prerequisiteInputs == {"warps"}
    assert plot.inputs == {"coadd", "residual", "sources", "metrics"}


def test_config_refuses_other_factors() -> None:
    with pytest.raises(FieldValidationError, match="oversampling"):
        FinerDeepPriorCoaddConfig(oversampling=4)
    assert Box.from_shape((4, 6), start=(-4, 2)) == finer_box(Box.from_shape((2, 3), start=(-2, 1)), 2)


@pytest.mark.parametrize("psf_mode", ["refine", "blind"])
def test_config_refuses_to_learn_psfs(psf_mode: str) -> None:
    config = FinerDeepPriorCoaddConfig(psf_mode=psf_mode)
    with pytest.raises(ValueError, match="on finer pixels it must be 'known'"):
        config.validate()


def test_a_figure_needs_the_warps() -> None:
    plot = FinerPlotDeepPriorCoaddConnections(config=FinerPlotDeepPriorCoaddConfig())
    inputs: dict[str, Any] = {name: (getattr(plot, name), [name]) for name in plot.inputs}
    assert plot.adjustQuantum(inputs | {"warps": (plot.warps, ["one"])}, {}, "plot", {}) == ({}, {})
    with pytest.raises(NoWorkFound, match="There are no warps for"):
        plot.adjustQuantum(inputs | {"warps": (plot.warps, [])}, {}, "plot", {})
