# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The products of a simulated scene, against a plain coadd that is made here from the warps alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import sep

from lsst.coadd.deepprior.fitted_patch import RestoreSettings
from lsst.coadd.deepprior.operators import CellLayout
from lsst.coadd.deepprior.psf import fwhm
from lsst.coadd.deepprior.restore import Restoration, restore
from lsst.coadd.deepprior.simulate import SceneConfig, simulate_scene
from lsst.coadd.deepprior.truth import render
from lsst.coadd.deepprior.warps import Warp

PLANES = ("BAD", "CR", "SAT", "NO_DATA")

CONFIG = SceneConfig(
    seed=6,
    n_cells=(2, 3),
    cell_shape=(80, 60),
    n_visits=8,
    n_trails=0,
    partial_fraction=0.0,
    psf_fwhm_change=0.05,
    saturation=1e9,
)
"""No trails, and no saturation: where the sharper visits are masked in a core the plain coadd loses flux."""


@pytest.fixture(scope="module")
def restored() -> tuple[list[Warp], Restoration, np.ndarray]:
    catalogue, warps = simulate_scene(CONFIG, "i")
    layout = CellLayout(*CONFIG.n_cells, *CONFIG.cell_shape)
    settings = RestoreSettings(steps=100, n_splits=8, n_variance_draws=2)
    result = restore([warp.observation(PLANES) for warp in warps], layout, settings)
    return warps, result, render(catalogue, result.target_sigma, warps[0].patch.outer_bbox)


def plain_coadd(warps: list[Warp]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inverse-variance coadd of the unmasked pixels, and its noise."""
    unusable = np.array([warp.unusable(PLANES) for warp in warps])
    variance = np.array([np.median(warp.variance[~bad]) for warp, bad in zip(warps, unusable, strict=True)])
    weight = np.where(unusable, 0.0, 1.0 / variance[:, None, None])
    flux = np.array([np.where(bad, 0.0, warp.image) for warp, bad in zip(warps, unusable, strict=True)])
    return (weight * flux).sum(axis=0) / weight.sum(axis=0), weight.sum(axis=0) ** -0.5


def footprints(coadd: np.ndarray, noise: np.ndarray, growth: float) -> np.ndarray:
    """Label the footprints of sources above S/N 10, grown by some pixels; sources that touch are one."""
    found, segments = sep.extract(coadd, 1.5, err=noise, minarea=5, segmentation_map=True)
    error = np.sqrt(found["npix"]) * np.median(noise)
    bright = np.isin(segments, 1 + np.flatnonzero(found["flux"] > 10.0 * error))
    reach = int(np.ceil(growth))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= growth
    return scipy.ndimage.label(scipy.ndimage.binary_dilation(bright, disc))[0]


def light_inside(footprint: np.ndarray, coadd: np.ndarray, psf: np.ndarray) -> float:
    """Return the part of the light of a point at the brightest pixel that falls into the footprint.

    The coadd has wings beyond a footprint, while the restored image holds that light inside.
    """
    y, x = np.unravel_index(np.argmax(np.where(footprint, coadd, -np.inf)), footprint.shape)
    half = psf.shape[0] // 2
    return float(psf[np.pad(footprint, half)[y : y + 2 * half + 1, x : x + 2 * half + 1]].sum())


def test_model_plus_residual_keeps_the_flux_of_footprints(restored) -> None:
    """Footprints at the border are left out: there the coadd spreads light beyond it that x keeps inside."""
    warps, result, _ = restored
    coadd, noise = plain_coadd(warps)
    labels = footprints(coadd, noise, 2.0 * fwhm(result.residual_psf[0, 0]))
    border = np.ones(labels.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    inner = np.setdiff1d(np.unique(labels), np.append(labels[border], 0))
    assert len(inner) >= 3
    seen = np.isfinite(result.residual)
    total = result.image + np.nan_to_num(result.residual)
    chosen = np.isin(labels, inner) & seen
    assert total[chosen].sum() == pytest.approx(coadd[chosen].sum(), rel=5e-3)
    for label in inner:
        one = (labels == label) & seen
        kept = light_inside(one, coadd, result.residual_psf[0, 0])
        assert 0.98 < kept < 1.0
        assert kept * total[one].sum() == pytest.approx(coadd[one].sum(), rel=0.01)


def test_restored_image_is_nearer_to_the_truth_than_the_coadd(restored) -> None:
    """At the target PSF, in the asinh stretch of the coadd noise: the coadd's error is halved at least."""
    warps, result, truth = restored
    coadd, noise = plain_coadd(warps)
    scale = np.median(noise)
    error, coadd_error = (
        np.sqrt(np.mean((np.arcsinh(image / scale) - np.arcsinh(truth / scale)) ** 2))
        for image in (result.image, coadd)
    )
    assert error < 0.5 * coadd_error


def test_variance_plane_is_that_of_the_blank_sky(restored) -> None:
    """The plane carries the noise of x where there is nothing, to a factor of 2."""
    _, result, truth = restored
    noise = np.sqrt(np.median(result.residual_variance))
    blank = (truth < 0.02 * noise) & np.isfinite(result.variance)
    scatter = np.std((result.image - truth)[blank])
    assert 0.5 < np.sqrt(np.mean(result.variance[blank])) / scatter < 2.0
