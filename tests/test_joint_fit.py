# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal

from lsst.coadd.deepprior import joint_fit
from lsst.coadd.deepprior.joint_fit import JointFit
from lsst.coadd.deepprior.plain_coadd import Coadd
from lsst.coadd.deepprior.psf import gaussian_stamp
from lsst.coadd.deepprior.stamps import Stamp, slope

SHAPE = (60, 84)


CORRELATION = np.outer([0.3, 1.0, 0.3], [0.4, 1.0, 0.4])


def widened(factor: float) -> np.ndarray:
    """Return a PSF with wings, (25, 25), wider by a factor."""
    squares = (np.arange(-12, 13) / factor) ** 2
    profile = (1.0 + np.add.outer(squares, squares) / 9.0) ** -4.0
    return profile / profile.sum()


def moffat() -> np.ndarray:
    """Return a PSF with wings, (25, 25)."""
    return widened(1.0)


def make_coadd(image: np.ndarray, rng: np.random.Generator, noise_correlation: np.ndarray | None) -> Coadd:
    """Return a coadd of 2x3 cells with a hole and unequal variances."""
    variance = np.repeat([1.0, 4.0], 30)[:, None] * rng.uniform(0.8, 1.2, SHAPE)
    image = image.copy()
    image[20:26, 30:41] = np.nan
    psf = np.tile(moffat(), (2, 3, 1, 1))
    return Coadd(np.zeros(SHAPE), 0.8, image, variance, psf, noise_correlation)


def dense(templates: list[Stamp]) -> np.ndarray:
    """Return templates as the rows of a matrix (template, pixel)."""
    rows = np.zeros((len(templates), *SHAPE))
    for row, stamp in zip(rows, templates, strict=True):
        row[stamp.slices] = stamp.array
    return rows


@pytest.mark.parametrize("correlated", [False, True])
def test_normal_equations_are_those_of_dense_matrices(correlated: bool) -> None:
    rng = np.random.default_rng(3)
    coadd = make_coadd(rng.normal(size=SHAPE), rng, CORRELATION if correlated else None)
    points = [coadd.point(y, x) for y, x in ((3.2, 5.0), (9.0, 14.4), (31.7, 44.1), (57.0, 80.3))]
    far = [Stamp(-6, 70, np.ones((9, 31))).cropped(SHAPE)]
    templates = [*points, *(slope(point, 1) for point in points), *far]
    fit = JointFit.of(templates, coadd)
    t = dense(templates)
    np.testing.assert_allclose(fit.right, np.einsum("kyx,yx->k", t, coadd.weight * coadd.image), rtol=1e-10)
    normal = np.einsum("kyx,yx,lyx->kl", t, coadd.weight, t)
    scale = np.sqrt(np.outer(normal.diagonal(), normal.diagonal()))
    np.testing.assert_allclose(fit.normal.toarray() / scale, normal / scale, atol=2e-7)
    scaled = t * coadd.weight * np.sqrt(coadd.variance)
    smooth = scaled
    if correlated:
        smooth = np.stack([scipy.signal.convolve2d(one, CORRELATION, mode="same") for one in scaled])
    noise = np.einsum("kyx,lyx->kl", scaled, smooth)
    np.testing.assert_allclose(fit.noise.toarray() / scale, noise / scale, atol=4e-7)


def test_errors_in_a_dense_field_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All templates are linked: neighbours make errors half as large again; those beyond do little."""
    rng = np.random.default_rng(5)
    coadd = make_coadd(rng.normal(size=SHAPE), rng, CORRELATION)
    points = [coadd.point(y, x) for y in np.arange(5.3, 45.0, 2.6) for x in np.arange(4.6, 60.0, 2.6)]
    fit = JointFit.of([*points, *(slope(p, axis) for axis in (0, 1) for p in points)], coadd)
    whole = fit.errors()
    alone = np.sqrt(fit.noise.diagonal()) / fit.normal.diagonal()
    assert np.median(whole / alone) > 1.5
    monkeypatch.setattr(joint_fit, "_LARGEST", 80)
    np.testing.assert_allclose(fit.errors(), whole, rtol=0.02)


def test_wings_of_a_bright_star_are_not_given_to_a_faint_one() -> None:
    """The star is a hundred thousand times as bright, and the other 14 pixels away."""
    rng = np.random.default_rng(4)
    empty = make_coadd(np.zeros(SHAPE), rng, None)
    points = [empty.point(30.3, 40.2), empty.point(38.0, 52.1)]
    flux = np.array([1e6, 10.0])
    coadd = make_coadd(np.einsum("k,kyx->yx", flux, dense(points)), rng, None)
    np.testing.assert_allclose(JointFit.of(points, coadd).solution(), flux, rtol=1e-4)


def test_templates_that_share_no_pixel_have_no_product() -> None:
    rng = np.random.default_rng(5)
    coadd = make_coadd(rng.normal(size=SHAPE), rng, None)
    fit = JointFit.of([coadd.point(15.0, 15.0), coadd.point(15.0, 65.0), coadd.point(45.0, 65.0)], coadd)
    np.testing.assert_array_equal(fit.normal.toarray() != 0.0, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_correlation_of_neighbours() -> None:
    """Points of a PSF P that are d apart have the correlation sum P(x) P(x - d) / sum P^2."""
    rng = np.random.default_rng(6)
    psf = np.tile(moffat(), (2, 3, 1, 1))
    coadd = Coadd(np.zeros(SHAPE), 0.8, rng.normal(size=SHAPE), np.ones(SHAPE), psf)
    points = [coadd.point(15.0, 14.0), coadd.point(17.0, 19.0), coadd.point(45.0, 65.0)]
    overlap = (moffat()[2:, 5:] * moffat()[:-2, :-5]).sum() / (moffat() ** 2).sum()
    expected = np.zeros((3, 3))
    expected[0, 1] = expected[1, 0] = overlap
    np.testing.assert_allclose(JointFit.of(points, coadd).correlation().toarray(), expected, rtol=1e-9)


def test_each_pixel_of_a_point_has_the_psf_of_its_own_cell() -> None:
    """The star is a pixel from one border of its cell and four from the other, and one cell is missing."""
    psf = np.stack([[widened(1.0), widened(1.3), widened(0.9)], [widened(1.2), widened(1.1), widened(1.4)]])
    psf[1, 0] = np.nan
    model = np.zeros(SHAPE)
    star = gaussian_stamp(0.8, 25)
    half = star.shape[0] // 2
    y, x = 28, 32
    model[y - half : y + half + 1, x - half : x + half + 1] = star
    coadd = Coadd(model, 0.8, np.zeros(SHAPE), np.ones(SHAPE), psf)
    (template,) = dense([coadd.point(y, x)])
    there = np.ones(SHAPE, dtype=bool)
    there[30:, :28] = False
    np.testing.assert_allclose(template[there], coadd.image[there], atol=2e-4 * template.max())
    one = Coadd(model, 0.8, np.zeros(SHAPE), np.ones(SHAPE), np.tile(psf[0, 1], (2, 3, 1, 1)))
    assert np.abs(one.image - coadd.image)[there].max() > 0.03 * template.max()
    (outside,) = dense([coadd.point(32.0, 26.0)])  # in the missing cell
    np.testing.assert_allclose(outside[20:30, 14:28], psf[0, 0, :10, :14], atol=1e-6)


def test_what_does_not_fit_together_is_refused() -> None:
    image, psf = np.ones(SHAPE), np.tile(moffat(), (2, 3, 1, 1))
    with pytest.raises(ValueError, match=r"residual is \(59, 84\) and the model \(60, 84\)"):
        Coadd(image, 0.8, image[1:], image, psf)
    with pytest.raises(ValueError, match=r"variance is \(60, 83\) and the model"):
        Coadd(image, 0.8, image, image[:, 1:], psf)
    with pytest.raises(ValueError, match="PSFs of 2x5 cells do not fit"):
        Coadd(image, 0.8, image, image, np.tile(moffat(), (2, 5, 1, 1)))


def test_a_missing_cell_has_the_psf_of_the_nearest_cell() -> None:
    """Two cells of five are missing, and have other neighbours."""
    psf = np.stack([widened(factor) for factor in (1.0, 1.3, 0.9, 1.2, 1.4)])[None]
    seen = psf.copy()
    seen[0, 1:3] = np.nan
    coadd = Coadd(np.zeros((20, 100)), 0.8, np.zeros((20, 100)), np.ones((20, 100)), seen)
    for x, nearest in ((30, 0), (50, 3)):
        np.testing.assert_array_equal(coadd.psf_at(10, x), psf[0, nearest])
        image = np.zeros((20, 100))
        point = coadd.point(10, x)
        image[point.slices] = point.array
        np.testing.assert_allclose(image[:, x - 10 : x + 10], psf[0, nearest, 2:22, 2:22], atol=1e-12)
