# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.
from __future__ import annotations

from pathlib import Path

import click.testing
import pytest

from lsst.coadd.deepprior import demo
from lsst.daf.butler import Butler, CollectionType


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo as small as it can be: one patch, one band, three visits, a few steps."""
    monkeypatch.setattr(demo, "_PATCHES", 1)
    monkeypatch.setattr(demo, "_BANDS", ("r",))
    monkeypatch.setattr(demo, "_VISITS", 3)
    run = demo._run

    def quick(command: str, *arguments: str | Path) -> None:
        extra = {
            "simulate": ("--cells", "1", "2", "--seed", "3"),
            "run": ("-c", "deepPriorCoadd:steps=3", "-c", "deepPriorCoadd:base_steps=20"),
        }.get(str(arguments[0]), ())
        run(command, *arguments, *extra)

    monkeypatch.setattr(demo, "_run", quick)


def test_demo_runs_and_reuses(small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner = click.testing.CliRunner()
    outdir = tmp_path / "demo"
    first = runner.invoke(demo.main, [str(outdir)])
    assert first.exit_code == 0, first.output
    for name in demo._DATASETS:
        assert name in first.output
    assert "seeing, FWHM of the PSF" in first.output
    figure = next(line.strip() for line in first.output.splitlines() if line.strip().endswith(".png"))
    assert Path(figure).is_file()
    capfd.readouterr()

    second = runner.invoke(demo.main, [str(outdir)])
    assert second.exit_code == 0, second.output
    messages = capfd.readouterr()
    assert "3 were there already" in messages.out
    assert "$ pipetask" not in messages.err + second.output
    assert "$ deepprior simulate" not in messages.err + second.output
    assert second.output.splitlines()[-8:] == first.output.splitlines()[-8:]


def test_failing_step_ends_in_one_sentence(small: None, tmp_path: Path) -> None:
    outdir = tmp_path / "demo"
    (outdir / "repo").mkdir(parents=True)
    (outdir / "repo" / "something_else").touch()
    result = click.testing.CliRunner().invoke(demo.main, [str(outdir)])
    assert result.exit_code == 1
    assert "failed with exit status 1" in result.output
    assert "'make clean', or removing the folder of the demo, starts over." in result.output
    assert (outdir / "repo" / "something_else").exists()


def test_interrupted_before_the_first_dataset_is_not_complete(tmp_path: Path) -> None:
    """What pipetask leaves that is stopped after it has made its collections."""
    Butler.makeRepo(str(tmp_path))
    with Butler.from_config(str(tmp_path), writeable=True) as butler:
        butler.collections.register(demo._OUTPUT, CollectionType.CHAINED)
        butler.collections.register(f"{demo._OUTPUT}/1", CollectionType.RUN)
        butler.collections.redefine_chain(demo._OUTPUT, [f"{demo._OUTPUT}/1"])
        assert not demo._is_complete(butler)


def test_another_scene_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps and repository are kept while the scene is the same; one of unknown origin is kept always."""
    calls = []

    def simulate(command: str, *arguments: str | Path) -> None:
        calls.append(arguments)
        (tmp_path / "warps" / f"warp_{len(calls)}.fits").touch()

    monkeypatch.setattr(demo, "_run", simulate)
    warps, repo = tmp_path / "warps", tmp_path / "repo"

    def names() -> list[str]:
        repo.mkdir(exist_ok=True)
        return [path.name for path in demo._simulate(warps, repo)]

    assert names() == ["warp_1.fits"]
    assert names() == ["warp_1.fits"]
    assert repo.exists()
    monkeypatch.setattr(demo, "_VISITS", 5)
    assert names() == ["warp_2.fits"]
    assert not repo.exists()
    assert calls[-1][calls[-1].index("--visits") + 1] == "5"
    (warps / "complete").write_text("")  # as an interrupted simulation leaves it
    assert names() == ["warp_3.fits"]
    assert repo.exists()  # it is not known to be the demo's


@pytest.mark.parametrize("name", ["warps", "warps/warp_4001.fits"])
def test_warps_of_others_are_not_removed(small: None, tmp_path: Path, name: str) -> None:
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.touch()
    result = click.testing.CliRunner().invoke(demo.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert f"{tmp_path / 'warps'} was not made by the demo" in result.output
    assert own.exists()


def test_as_many_processes_as_cores_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {5, 6, 7}, raising=False)
    assert demo._n_processes() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)), raising=False)
    assert demo._n_processes() == 4
    monkeypatch.delattr("os.sched_getaffinity")
    assert demo._n_processes() == 4
