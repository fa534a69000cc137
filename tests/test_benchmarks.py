# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The measures of the benchmark against known answers, and its way from a scene to the table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lsst.coadd.deepprior.families import FAMILIES
from lsst.coadd.deepprior.psf import gaussian_stamp

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
metrics, summary, cache, scenes, score, methods, reach, report, fidelity, simulation, sky_module = (
    importlib.import_module(name)
    for name in (
        *("metrics", "summary", "cache", "scenes", "score"),
        *("methods", "reach", "report", "fidelity", "simulation", "sky"),
    )
)

SHAPE = (40, 60)
EVERYWHERE = np.ones(SHAPE, dtype=bool)


def test_stretch_is_linear_in_the_sky_and_logarithmic_in_stars() -> None:
    np.testing.assert_allclose(metrics.stretch(np.array([0.02, -0.02]), 2.0), [0.01, -0.01], rtol=1e-4)
    np.testing.assert_allclose(metrics.stretch(np.array([2e6]), 2.0), [np.log(2e6)], rtol=1e-6)


def test_psnr_counts_only_chosen_pixels() -> None:
    truth = np.zeros(SHAPE)
    image = np.full(SHAPE, 0.1)
    assert metrics.psnr(image, truth, 10.0, EVERYWHERE) == pytest.approx(40.0)
    image[3, 50] = 1e6
    where = EVERYWHERE.copy()
    where[3, 50] = False
    assert metrics.psnr(image, truth, 10.0, where) == pytest.approx(40.0)
    assert metrics.psnr(truth, truth, 1.0, EVERYWHERE) == np.inf


def test_ssim_of_known_pairs() -> None:
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(SHAPE)
    assert metrics.ssim(truth, truth, 5.0, EVERYWHERE) == pytest.approx(1.0)
    # Constant images differ in luminance alone: (2 m n + c1) / (m^2 + n^2 + c1).
    flat = np.full(SHAPE, 2.0)
    c1 = 0.01**2
    expected = (2 * 2.0 * 1.0 + c1) / (4.0 + 1.0 + c1)
    assert metrics.ssim(flat, flat / 2.0, 1.0, EVERYWHERE) == pytest.approx(expected)
    board = (-1.0) ** np.add.outer(np.arange(SHAPE[0]), np.arange(SHAPE[1]))  # no mean, no luminance term
    inner = np.zeros(SHAPE, dtype=bool)
    inner[6:-6, 6:-6] = True
    assert metrics.ssim(-board, board, 2.0, inner) == pytest.approx(-1.0, abs=0.01)
    noisy = truth + rng.standard_normal(SHAPE)
    assert metrics.ssim(noisy, truth, 5.0, EVERYWHERE) == pytest.approx(
        metrics.ssim(truth, noisy, 5.0, EVERYWHERE)
    )


def test_ssim_window_reaches_five_pixels() -> None:
    truth, image = np.zeros(SHAPE), np.zeros(SHAPE)
    image[20, 30] = 1.0
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    reached = np.maximum(abs(rows - 20), abs(columns - 30)) <= 5
    assert metrics.ssim(image, truth, 1.0, ~reached) == 1.0
    assert metrics.ssim(image, truth, 1.0, np.maximum(abs(rows - 20), abs(columns - 30)) == 5) < 1.0


def test_nrmse() -> None:
    truth = np.full(SHAPE, 4.0)
    assert metrics.nrmse(truth + 1.0, truth, EVERYWHERE) == pytest.approx(0.25)
    assert np.isnan(metrics.nrmse(truth, np.zeros(SHAPE), EVERYWHERE))


def test_near() -> None:
    chosen = metrics.near(SHAPE, [50.0], [10.0], 2.0)
    assert chosen.sum() == 13
    assert chosen[10, 52]
    assert chosen[12, 50]
    assert not chosen[12, 51]


def test_aperture_ratio_and_star_shape() -> None:
    alone = 100.0 * gaussian_stamp(0.8, 21, dx=0.3, dy=-0.2)
    x, y = 10.3, 9.8
    assert metrics.aperture_ratio(-0.2 * alone, alone, x, y, 7.5) == pytest.approx(0.8)
    psf = gaussian_stamp(0.8, 25)
    assert metrics.star_shape(0.0 * alone, alone, x, y, psf) == pytest.approx((1.0, 0.0, 0.0), abs=1e-6)
    wide = 100.0 * gaussian_stamp(0.88, 21, dx=0.3, dy=-0.2)
    assert metrics.star_shape(wide - alone, alone, x, y, psf) == pytest.approx((1.1, 0.0, 0.0), abs=1e-6)
    rows, columns = np.mgrid[-10:11, -10:11]
    elongated = np.exp(-0.5 * ((columns / 1.0) ** 2 + (rows / 0.8) ** 2))
    size, e1, e2 = metrics.star_shape(elongated, 0.0 * alone, 10.0, 10.0, psf)
    assert size == pytest.approx(np.sqrt(1.0 * 0.8) / 0.8, rel=1e-6)
    assert e1 == pytest.approx((1.0 - 0.64) / (1.0 + 0.64), rel=1e-6)
    assert e2 == pytest.approx(0.0, abs=1e-9)


def test_left_over_is_relative_to_the_surroundings() -> None:
    error = np.full(SHAPE, 0.5)
    trail = np.zeros(SHAPE, dtype=bool)
    trail[20:22] = True
    error[trail] += 0.3
    error[20, 40] = 1e5
    sky = EVERYWHERE.copy()
    sky[20, 40] = False
    excess = metrics.left_over(error, trail, sky)
    assert excess.value == pytest.approx(0.3)
    assert excess.n_pixels == 2 * 60 - 1
    assert np.isnan(metrics.left_over(error, np.zeros(SHAPE, dtype=bool), sky).value)


def test_peaks_are_ranked_and_have_positions() -> None:
    image = np.zeros(SHAPE)
    for x, y, flux in ((12.3, 20.0, 50.0), (45.0, 30.4, 90.0)):
        rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
        image += flux * np.exp(-0.5 * ((columns - x) ** 2 + (rows - y) ** 2))
    x, y = metrics.peaks(image, gaussian_stamp(1.0, 11), np.ones(SHAPE), EVERYWHERE)
    np.testing.assert_allclose(x[:2], [45.0, 12.3], atol=0.05)
    np.testing.assert_allclose(y[:2], [30.4, 20.0], atol=0.05)
    noise = np.ones(SHAPE)
    noise[:, 30:] = 3.0
    x, _ = metrics.peaks(image, gaussian_stamp(1.0, 11), noise, EVERYWHERE)
    assert x[0] == pytest.approx(12.3, abs=0.05)


def test_matches_follow_the_ranking() -> None:
    x, y = np.array([10.8, 10.1, 30.0, 12.0]), np.array([5.0, 5.0, 5.0, 5.0])
    index = metrics.match_by_rank(x, y, np.array([10.0, 12.0]), np.array([5.0, 5.0]), 1.5)
    np.testing.assert_array_equal(index, [0, -1, -1, 1])
    assert len(metrics.match_by_rank(x[:0], y[:0], x, y, 1.0)) == 0
    np.testing.assert_array_equal(metrics.match_by_rank(x, y, x[:0], y[:0], 1.0), -1)


def test_found_at_purity_goes_down_to_the_last_pure_rank() -> None:
    index = np.array([4, 0, -1, 1, 2, -1, -1])
    np.testing.assert_array_equal(metrics.found_at_purity(index, 5, 0.95), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(metrics.found_at_purity(index, 5, 0.8), [1, 1, 1, 0, 1])
    assert not metrics.found_at_purity(np.array([-1, 0]), 5, 0.95).any()


@pytest.mark.parametrize("axis", [0, 1])
def test_seam(axis: int) -> None:
    error = 0.01 * np.random.default_rng(2).standard_normal(SHAPE)
    borders = ([20], [30])
    step, ratio = metrics.seam(error, borders, EVERYWHERE)
    assert step < 0.01
    assert ratio < 3.0
    stepped = error.copy()
    stepped[np.s_[20:] if axis == 0 else np.s_[:, 30:]] += 0.1
    step, ratio = metrics.seam(stepped, borders, EVERYWHERE)
    assert step == pytest.approx(0.1, abs=0.01)
    assert ratio > 5.0
    # A step that is not at a border is no seam.
    assert metrics.seam(np.roll(stepped, 7, axis), borders, EVERYWHERE)[0] < 0.05


def test_ring() -> None:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    radius = np.hypot(columns - 40, rows - 15)
    error = np.where((radius >= 6.0) & (radius < 7.0), -0.4, 0.0)
    assert metrics.ring(error, 40.0, 15.0, 4.0, 12.0, EVERYWHERE) == pytest.approx(0.4)
    assert metrics.ring(error, 40.0, 15.0, 8.0, 12.0, EVERYWHERE) == 0.0
    assert metrics.ring(error, 15.0, 40.0, 4.0, 8.0, EVERYWHERE) == 0.0
    assert np.isnan(metrics.ring(error, 40.0, 15.0, 4.0, 12.0, ~EVERYWHERE))


def test_summaries_pool_objects_and_take_medians_of_scenes() -> None:
    rows = [
        {
            "psnr": 30.0,
            "flux_stars": [1.0, 1.02],
            "pairs_split": [True, False],
            "rings": [0.1],
            "artifacts": None,
        },
        {"psnr": 34.0, "flux_stars": [1.04], "pairs_split": [], "rings": [0.3, 0.2], "artifacts": 0.5},
    ]
    assert summary.summarise(rows, "psnr")[::2] == (32.0, 2)
    number, error, n = summary.summarise(rows, "star_flux")
    assert (number, n) == (pytest.approx(0.02), 3)
    assert error == pytest.approx(1.253 * 1.4826 * 0.02 / np.sqrt(3.0))
    assert summary.summarise(rows, "star_flux_rms")[0] == pytest.approx(0.02)
    assert summary.summarise(rows, "pairs")[0] == 0.5
    assert summary.summarise(rows, "rings")[0] == 0.3
    assert summary.summarise(rows, "artifacts")[::2] == (0.5, 1)
    assert summary.summarise([], "psnr")[2] == 0


def test_worse() -> None:
    assert summary.worse("psnr", 30.0, 31.0)
    assert summary.worse("sky_rms", 0.3, 0.2)
    assert summary.worse("sky_mean", -0.3, 0.2)
    assert not summary.worse("sky_mean", -0.1, 0.2)
    assert not summary.worse("psnr", np.nan, 31.0)


def test_code_digests_follow_code_and_imports_not_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cache, "_HERE", tmp_path)

    def code(first: str, second: str) -> str:
        cache._parsed.cache_clear()
        (tmp_path / "first.py").write_text(first)
        (tmp_path / "second.py").write_text(second)
        return cache.code_of(["first"])

    before = code("from .second import a\n", "a = 1\n")
    assert code('"""Text."""\nfrom .second import a  # comment\n', "a =  1\n") == before
    assert code("from .second import a\n", "a = 2\n") != before
    assert code("a = 3\n", "a = 1\n") == code("a = 3\n", "a = 2\n")
    cache._parsed.cache_clear()
    with pytest.raises(FileNotFoundError, match="no module third"):
        cache.code_of(["third"])


def test_another_network_is_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "NETWORK", tmp_path / "network")
    keys = []
    for weights in (b"one", b"other", b"one"):
        (tmp_path / "network").write_bytes(weights)
        keys.append(cache.code_and_network(["scenes"]))
    assert keys[0] == keys[2] != keys[1]
    assert cache.code_and_network(["sky"]) != keys[0]


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write_atomically(tmp_path / "file", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small scene with unequal sides, and its file."""
    small = dataclasses.replace(FAMILIES["standard"], n_cells=(1, 2), cell_shape=(150, 80), n_visits=4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(FAMILIES, "standard", small)
        made = simulation.make_scene("standard", 5)
    path = tmp_path_factory.mktemp("scene") / "scene.npz"
    made.save(path)
    return made, path


def test_scene_survives_its_file(scene: tuple[Any, Path], tmp_path: Path) -> None:
    """Outputs are named by the content of the file, so it must be the same each time."""
    made, path = scene
    made.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    again = scenes.BenchScene.load(path)
    np.testing.assert_array_equal(again.truth, made.truth)
    assert (again.layout, again.start) == (made.layout, made.start)
    np.testing.assert_array_equal(again.catalogue["flux_nJy"], made.catalogue["flux_nJy"])
    for one, other in zip(again.observations, made.observations, strict=True):
        np.testing.assert_array_equal(one.psf, other.psf)
        assert (one.origin, one.name) == (other.origin, other.name)


def test_truth_is_perfect_and_dimmed_truth_is_not(scene: tuple[Any, Path]) -> None:
    made, _ = scene
    sky = sky_module.sky_of(made)
    psf = gaussian_stamp(scenes.TARGET_SIGMA, 25)
    row = score.score_image(made, sky, made.truth, psf)
    assert row["psnr"] is None  # infinite
    assert (row["ssim"], row["nrmse"], row["sky_error"], row["artifacts"]) == pytest.approx(
        (1.0, 0.0, 0.0, 0.0)
    )
    assert row["completeness"] > 0.8
    assert sum(sky.isolated & (sky.snr > 5.0)) >= 3
    np.testing.assert_allclose(row["star_size"], 1.0, atol=1e-3)
    dimmed = 0.8 * made.truth
    dimmed[3, 5] = np.nan
    row = score.score_image(made, sky, dimmed, psf)
    assert row["nrmse"] == pytest.approx(0.2, rel=1e-2)
    assert row["not_finite"] == pytest.approx(1.0 / sky.covered.sum())
    for name in ("flux_stars", "flux_galaxies_22_24", "flux_galaxies_24_25.5"):
        # Neighbours are subtracted as they truly are, so what they lack counts here.
        assert np.all(np.array(row[name]) < 0.805)


def test_coadd_of_noiseless_visits_is_the_truth_at_its_own_resolution(scene: tuple[Any, Path]) -> None:
    made, _ = scene
    sky = sky_module.sky_of(made)
    row = score.score_image(made, sky, sky.coadd_truth, sky.coadd_psf, own_resolution=True)
    assert row["ssim"] == pytest.approx(1.0)
    np.testing.assert_allclose(row["star_size"], 1.0, atol=0.01)
    np.testing.assert_allclose(row["flux_stars"], 1.0, atol=1e-6)
    assert sky.coadd_truth.sum() == pytest.approx(made.truth.sum(), rel=0.03)


def test_catalogue_of_true_fluxes_is_perfect(scene: tuple[Any, Path]) -> None:
    made, _ = scene
    sky = sky_module.sky_of(made)
    x, y, flux = (np.asarray(made.catalogue[name], dtype=float) for name in ("x", "y", "flux_nJy"))
    row = score.score_catalogue(made, sky, x, y, 0.9 * flux, np.ones(len(x)))
    assert row["catalogue_completeness"] == 1.0
    assert all(row["catalogue_pairs_split"])
    np.testing.assert_allclose(row["catalogue_flux_galaxies_24_25.5"], 0.9)
    assert len(row["catalogue_flux_galaxies_24_25.5"]) == row["catalogue_n_galaxies_24_25.5"]
    swapped = score.score_catalogue(made, sky, y, x, flux, np.ones(len(x)))
    assert swapped["catalogue_completeness"] < 0.2


def test_run_of_a_method_gives_rows(scene: tuple[Any, Path], tmp_path: Path) -> None:
    made, path = scene
    output = tmp_path / "coadd.npz"
    methods._main(path, "coadd", [""], output)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(score, "CUTOUT", (slice(20, 120), slice(30, 130)))
        rows = score.score_output(path, output, [""], whole=True, own_resolution=True)
    json.dumps(rows, allow_nan=False)
    assert rows["run"]["memory"] >= rows["run"]["memory_before"] > 100.0
    assert rows["run"]["seconds"] > 0.0
    assert rows["own resolution"]["nrmse"] < 0.6 * rows[""]["nrmse"]
    np.testing.assert_allclose(rows["own resolution"]["star_size"], 1.0, atol=0.05)
    assert np.all(np.array(rows[""]["star_size"]) > 1.5)
    assert rows[""]["sky_rms"] == pytest.approx(1.0, abs=0.3)
    assert rows[""]["cutout"]["blank_share"] > 0.0


class FakeResults:
    """Rows of one method that are all alike."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self._rows = rows

    def rows(self, family: str, seeds: Any, method: str, setting: str) -> list[dict[str, Any]]:
        known = family == "standard" and method in self._rows
        return [self._rows[method] | {"seed": seed} for seed in seeds] if known else []

    def tuned(self, method: str) -> str | None:
        return methods.METHODS[method].grid[0]


SEEDS = dict.fromkeys((*FAMILIES, simulation.GLOW), (1, 2))


def row(**numbers: Any) -> dict[str, Any]:
    """Make a row that has all entries."""
    entries = {
        measure.source: [1.0] if measure.how != "median" else 0.0 for measure in summary.MEASURES.values()
    }
    result = entries | {"run": {"seconds": 1.0}} | numbers
    return result | {"cutout": dict(result)}


def test_what_was_not_run_is_said_so() -> None:
    text = report.make(FakeResults({}), SEEDS, (100,), {})
    for line in text.splitlines():
        if line.startswith("| inverse-variance coadd"):
            assert line.count("not run") == line.count("|") - 2
    assert "nan" not in text.replace("finance", "")


def test_report_says_who_wins() -> None:
    rows = {"richardson_lucy": row(psnr=30.0, ssim=0.9), "scratch": row(psnr=29.0, ssim=0.97)}
    text = report.make(FakeResults(rows), SEEDS, (100,), {})
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    psnr = next(line for line in lines if line.startswith("| PSNR (dB) †"))
    assert "30.00 (Richardson-Lucy" in psnr
    assert "missed by 1.00" in psnr
    assert "| met |" in next(line for line in lines if line.startswith("| SSIM | 0.950"))
    (better,) = (line for line in text.splitlines() if line.startswith("Baselines that are better"))
    assert "PSNR (dB) (Richardson-Lucy" in better
    assert "SSIM" not in better


def test_pretrained_start_is_compared_with_scratch() -> None:
    rows = {
        "scratch": row(psnr=30.0, run={"seconds": 80.0}),
        "pretrained": row(psnr=29.7, run={"seconds": 4.0}),
    }
    lines = reach.make(FakeResults(rows), (1, 2)).splitlines()
    (psnr,) = (line for line in lines if line.startswith("| PSNR (dB) | 0.20"))
    assert "| -0.30 | missed by 0.10 |" in psnr
    assert "| time | 0.1 | 0.050 | met | |" in lines


def test_starts_are_compared_scene_by_scene() -> None:
    first = [row(psnr=value) | {"seed": seed} for seed, value in ((1, 30.0), (2, 33.0), (3, 36.0))]
    second = [row(psnr=value) | {"seed": seed} for seed, value in ((3, 36.2), (2, 33.1), (1, 30.6))]
    assert reach._by_scene(first, second, "psnr") == "median 0.20, mean 0.30 ± 0.15 (n = 3)"
    assert reach._by_scene(first, second[:1], "psnr") == ""
    assert reach._by_scene(first, second, "star_flux") == ""


def test_command_refuses_what_it_does_not_know() -> None:
    runner = CliRunner()
    result = runner.invoke(fidelity.main, ["--family", "nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.output
    result = runner.invoke(fidelity.main, ["--seeds", "1;2"])
    assert result.exit_code == 2
    assert "not a list of whole numbers" in result.output


def test_finished_work_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose files are there are found; another code or setting is another file."""
    monkeypatch.setattr(fidelity, "CACHE", tmp_path)
    job = fidelity.Job("standard", 1, "coadd", ("",))
    assert job.output is None
    job.scene.parent.mkdir()
    job.scene.write_bytes(b"scene")
    job = dataclasses.replace(job)
    assert job.output is not None
    other = dataclasses.replace(job, method="richardson_lucy", settings=("steps=5",))
    third = dataclasses.replace(other, settings=("steps=10",))
    assert len({job.output, other.output, third.output}) == 3
    bench = fidelity.Bench(1)
    assert bench.rows("standard", [1], "coadd", "") == []
    assert job.row is not None
    cache.write_text(job.row, json.dumps({"": {"psnr": 1.0}, "run": {"seconds": 2.0}}))
    assert bench.rows("standard", [1, 2], "coadd", "") == [{"psnr": 1.0, "seed": 1, "run": {"seconds": 2.0}}]
    monkeypatch.setattr(fidelity, "method_version", lambda name: "other code")
    assert bench.rows("standard", [1], "coadd", "") == []
