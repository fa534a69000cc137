# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.
from __future__ import annotations

from pathlib import Path

import click.testing
import pytest

from lsst.coadd.deepprior import demo


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
