# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from astropy.table import Table
from matplotlib.figure import Figure

from lsst.coadd.deepprior.figure import FigureInputs, choose_zoom, draw_figure
from lsst.coadd.deepprior.psf import gaussian_stamp

FWHM = 5.0
FLAGS = ("edge", "no_data", "saturated", "blended", "residual_only")


def make_sources(rows: list[tuple[float, float, float]], **columns: list[float]) -> Table:
    """Make a catalogue of (x, y, flux), all points with an error of 10 nJy."""
    x, y, flux = np.array(rows, dtype=float).reshape(-1, 3).T
    table = Table({"x": x, "y": y, "flux": flux})
    table["flux_err"] = 10.0
    table["ixx"] = table["iyy"] = 1.0
    table["ixy"] = 0.0
    for flag in FLAGS:
        table[f"flag_{flag}"] = False
    for name, values in columns.items():
        table[name] = values
    return table


@pytest.fixture
def inputs() -> FigureInputs:
    rng = np.random.default_rng(3)
    shape = (70, 110)
    noise = rng.normal(0.0, 2.0, shape)
    restored = np.zeros(shape)
    restored[20:31, 30:41] = 900.0 * gaussian_stamp(1.0, 11)
    return FigureInputs(
        title="Tract 9, patch 4, i band",
        coadd=restored + noise,
        visit=restored + 3.0 * noise,
        restored=restored,
        visit_name="visit 7",
        residual=noise / 2.0,
        noise=2.0,
        psfs=(gaussian_stamp(2.1, 21), gaussian_stamp(1.6, 25), gaussian_stamp(1.0, 13)),
        fwhm=(4.9, 3.8, 2.355),
        sources=make_sources([(535.0, 125.0, 900.0), (537.0, 127.0, 400.0)]),
        origin=(100, 500),
        pixel_scale=0.2,
        curves={
            "base_step": [0.0, 20.0, 40.0],
            "base_objective": [3.0, 0.6, 0.5],
            "fit_step": [0.0, 25.0],
            "held_out": [0.52, 0.51],
        },
        facts={"Visits": "12", "Sources": "2", "Time": "3 s"},
    )


def png_size(figure: Figure) -> int:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return len(buffer.getvalue())


def test_images_share_one_stretch_and_one_field(inputs: FigureInputs) -> None:
    figure = draw_figure(inputs)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 8
    for row in (panels[:4], panels[4:]):
        coadd, visit, restored, residual = (axes.images[0].norm for axes in row)
        assert coadd.vmin == visit.vmin == restored.vmin
        assert coadd.vmax == visit.vmax == restored.vmax
        assert (residual.vmin, residual.vmax) == (-5.0, 5.0)
        assert len({axes.get_xlim() + axes.get_ylim() for axes in row}) == 1
    for axes, image in zip(
        panels, (inputs.coadd, inputs.visit, inputs.restored, inputs.residual), strict=False
    ):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
    assert panels[0].get_xlim() == (-0.5, 109.5)
    assert panels[0].get_ylim() == (-0.5, 69.5)
    assert png_size(figure) > 20000


def test_zoom_shows_the_blend_and_its_sources(inputs: FigureInputs) -> None:
    zoom = [axes for axes in draw_figure(inputs).axes if axes.images][6]
    left, right = zoom.get_xlim()
    bottom, top = zoom.get_ylim()
    np.testing.assert_allclose([(left + right) / 2, (bottom + top) / 2], [36.0, 26.0], atol=0.1)
    np.testing.assert_allclose(right - left, top - bottom)
    assert sorted(patch.center for patch in zoom.patches) == [(35.0, 25.0), (37.0, 27.0)]


def test_part_without_data_is_left_out(inputs: FigureInputs) -> None:
    coadd = inputs.coadd.copy()
    coadd[50:], coadd[:, :10] = np.nan, np.nan
    panel = draw_figure(dataclasses.replace(inputs, coadd=coadd)).axes[0]
    assert panel.get_xlim() == (9.5, 109.5)
    assert panel.get_ylim() == (-0.5, 49.5)


def test_star_lies_on_the_target_psf(inputs: FigureInputs) -> None:
    figure = draw_figure(dataclasses.replace(inputs, sources=make_sources([(535.0, 125.0, 900.0)])))
    (psf,) = (axes for axes in figure.axes if axes.get_title() == "PSF")
    star = psf.lines[-1]
    radius = star.get_xdata() / 0.2
    np.testing.assert_allclose(star.get_ydata(), np.exp(-0.5 * radius**2), atol=1e-3)


@pytest.mark.parametrize(
    "sources",
    [
        make_sources([(535.0, 125.0, 900.0)], flux_err=[20.0]),
        make_sources([(535.0, 125.0, 900.0)], ixx=[1.15], iyy=[1.15]),
        make_sources([(535.0, 125.0, 900.0)], ixx=[1.04], iyy=[0.93]),
        make_sources([(535.0, 125.0, 900.0)], ixy=[0.06]),
        make_sources([(535.0, 125.0, 900.0), (543.0, 125.0, 90.0)]),
        make_sources([(535.0, 125.0, 900.0)], flag_blended=[True]),
    ],
    ids=["faint", "large", "elongated", "elongated obliquely", "close", "blended"],
)
def test_what_is_no_clean_star_is_not_shown(inputs: FigureInputs, sources: Table) -> None:
    figure = draw_figure(dataclasses.replace(inputs, sources=sources))
    (psf,) = (axes for axes in figure.axes if axes.get_title() == "PSF")
    assert [line.get_label() for line in psf.lines] == ["plain coadd", "best exposure", "restored"]


@pytest.mark.parametrize(
    "change",
    [
        {"sources": make_sources([])},
        {"visit": np.full((70, 110), np.nan)},
        {
            "coadd": np.full((70, 110), np.nan),
            "restored": np.full((70, 110), np.nan),
            "residual": np.full((70, 110), np.nan),
            "sources": make_sources([]),
        },
        {"curves": {"base_step": [0.0], "base_objective": [1.0], "fit_step": [], "held_out": []}},
        {"facts": {}},
    ],
    ids=["no sources", "no exposure", "no data", "no fit", "no numbers"],
)
def test_what_is_missing_is_left_out(inputs: FigureInputs, change: dict[str, object]) -> None:
    assert png_size(draw_figure(dataclasses.replace(inputs, **change))) > 10000


@pytest.mark.parametrize(
    "method",
    [
        "pretrained network",
        "pretrained network, coupled with r, i",
        "network fitted from scratch, coupled with u, g, r, i",
        "network fitted from scratch, coupled with u, g, r, i, z",
        "maximum likelihood: no steps asked for, coupled with u, g, r, i, z",
    ],
)
def test_numbers_do_not_cover_each_other(inputs: FigureInputs, method: str) -> None:
    facts = {
        "Visits": "112",
        "Seeing, best to worst": "0.61\u2033 to 1.23\u2033",
        "Depth (5\u03c3, point source)": "26.03 mag",
        "Sources": "22041",
        "Pairs within the coadd's FWHM": "1234",
        "Sky noise, restored / coadd": "0.45",
        "Residual: \u03c7\u00b2 per pixel": "1.034",
        "Pixels with an outlier": "10.3 %",
        "Method": method,
        "Time": "1205 s",
    }
    figure = draw_figure(dataclasses.replace(inputs, facts=facts))
    figure.draw_without_rendering()
    (numbers,) = (axes for axes in figure.axes if axes.get_title() == "Numbers")
    assert [" ".join(text.get_text().split()) for text in numbers.texts] == [
        text for fact in facts.items() for text in fact
    ]
    boxes = [text.get_window_extent() for text in numbers.texts]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index]), numbers.texts[index]


def test_zoom_prefers_the_brightest_close_pair() -> None:
    sources = make_sources(
        [
            (100.0, 50.0, 9000.0),
            (20.0, 30.0, 800.0),
            (24.0, 30.0, 700.0),
            (60.0, 80.0, 2000.0),
            (60.0, 83.0, 300.0),
        ]
    )
    assert choose_zoom(sources, FWHM, (0.0, 0.0)) == (22.0, 30.0)
    sources["flag_saturated"][1] = True
    assert choose_zoom(sources, FWHM, (0.0, 0.0)) == (60.0, 81.5)


def test_zoom_without_a_pair() -> None:
    rows = [(100.0, 50.0, 9000.0), (20.0, 30.0, 800.0), (60.0, 80.0, 2000.0), (63.0, 80.0, 90.0)]
    galaxy = make_sources(rows, ixx=[1.0, 4.0, 1.0, 1.0])
    assert choose_zoom(galaxy, FWHM, (0.0, 0.0)) == (20.0, 30.0)
    assert choose_zoom(make_sources(rows), FWHM, (0.0, 0.0)) == (100.0, 50.0)
    assert choose_zoom(make_sources(rows[3:]), FWHM, (7.0, 8.0)) == (7.0, 8.0)
