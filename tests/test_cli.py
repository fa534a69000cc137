# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from astropy.table import Table
from click.testing import CliRunner, Result

from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.warp_files import read_warp_file


def deepprior(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_simulate_writes_what_ingest_reads(tmp_path: Path) -> None:
    outdir = tmp_path / "scene"
    options = "--patches 2 --bands g,i --visits 2 --cells 1 2 --cell-size 32 --seed 4".split()
    result = deepprior("simulate", outdir, *options)
    assert result.exit_code == 0, result.output
    assert f"8 warp files of 2 patches and their truth are in {outdir}" in result.output
    files = sorted(outdir.glob("warp_*.fits"))
    assert len(files) == 8
    headers = [read_warp_file(file).header for file in files]
    assert {(h.patch, h.band) for h in headers} == {(p, b) for p in (0, 1) for b in "gi"}
    # The patches are neighbours, with the same rows, and share their visits.
    boxes = {header.patch: header.cells.bbox for header in headers if header.cells is not None}
    assert boxes[0].shape == (32, 64)
    assert boxes[0].y == boxes[1].y
    assert boxes[0].x.stop == boxes[1].x.start
    assert {h.visit for h in headers if h.patch == 0} == {h.visit for h in headers if h.patch == 1}
    truth = [Table.read(outdir / f"truth_{patch}_g.ecsv") for patch in (0, 1)]
    assert truth[0].meta["seed"] == 4
    assert list(truth[0]["x"]) != list(truth[1]["x"])
    result = deepprior("ingest", tmp_path / "repo", *files)
    assert result.exit_code == 0, result.output
    assert "8 warps of 2 patches ingested into deepprior/warps" in result.output
    result = deepprior("ingest", tmp_path / "other", files[0])
    assert "1 warp of 1 patch ingested into deepprior/warps" in result.output
    result = deepprior("simulate", outdir, "--visits", "1")
    assert result.exit_code == 1
    assert (
        f"{outdir} holds files of another scene, truth_0_g.ecsv for instance; name another" in result.output
    )
    assert sorted(outdir.glob("warp_*.fits")) == files


@pytest.mark.parametrize("bands", ["", "r,j", "ri"])
def test_simulate_refuses_unknown_bands(bands: str, tmp_path: Path) -> None:
    result = deepprior("simulate", tmp_path / "scene", "--bands", bands)
    assert result.exit_code == 2
    assert "--bands: choose from u,g,r,i,z,y" in result.output
    assert not (tmp_path / "scene").exists()


def test_simulate_makes_a_band_once(tmp_path: Path) -> None:
    result = deepprior("simulate", tmp_path / "scene", "--bands", "r, r")
    assert result.exit_code == 2
    assert "--bands: 'r, r' names a band twice." in result.output
    assert not (tmp_path / "scene").exists()


def test_visits_of_two_bands_have_different_numbers(tmp_path: Path) -> None:
    result = deepprior("simulate", tmp_path / "scene", "--visits", "1001")
    assert result.exit_code == 2
    assert "1001 is not in the range 1<=x<=1000" in result.output


def test_simulate_into_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("A file.")
    result = deepprior("simulate", tmp_path / "file" / "scene", "--visits", "1", "--cell-size", "16")
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("Error: The files cannot be written: ")


def test_help_names_all_commands() -> None:
    result = deepprior("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("ingest", "simulate"))


def test_ingest_needs_files(tmp_path: Path) -> None:
    result = deepprior("ingest", tmp_path / "repo")
    assert result.exit_code == 2
    assert "Missing argument 'FILE...'" in result.output


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "lsst.coadd.deepprior.cli", "simulate", str(tmp_path / "scene")]
    options = "--patches 1 --bands i --visits 2 --cells 1 1 --cell-size 32".split()
    process = subprocess.run(
        command + options,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"TERM": "xterm"},
        check=False,
    )
    os.close(stderr)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert "simulating patch 0" in shown
    assert "2/2" in shown
    assert "━" in shown
