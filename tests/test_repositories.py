# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""Repositories and collections as users name them in commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_ingest import ingest, one_line, refs

import lsst.coadd.deepprior
from lsst.coadd.deepprior.cli import main
from lsst.coadd.deepprior.dimension_records import copy_patches
from lsst.daf.butler import Butler

NETWORK = Path(lsst.coadd.deepprior.__file__).with_name("resources") / "networks" / "default.safetensors"


def test_places_that_cannot_hold_a_repository(warp_files: list[Path], tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("Important.")
    regular_file = tmp_path / "file"
    regular_file.write_text("A file.")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "butler.yaml").write_text("datastore: [")
    for repo, reason in (
        (occupied, "is not a Butler repository"),
        (regular_file, "is not a Butler repository"),
        (regular_file / "repo", "cannot be"),
        (Path("/proc/repo"), "cannot be"),
        (damaged, "cannot be opened as a Butler repository"),
    ):
        message = one_line(ingest(repo, warp_files[0]))
        assert str(repo) in message
        assert reason in message
    assert [path.name for path in occupied.iterdir()] == ["thesis.tex"]
    assert regular_file.read_text() == "A file."


def test_a_repository_that_is_named_by_a_uri_or_an_alias(
    warp_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absent = (tmp_path / "absent").as_uri()
    message = one_line(CliRunner().invoke(main, ["ingest", absent, str(warp_files[0])]))
    assert f"{absent} cannot be opened as a Butler repository" in message
    assert list(tmp_path.iterdir()) == []
    repo = tmp_path / "repo"
    assert ingest(repo, warp_files[0]).exit_code == 0
    index = tmp_path / "index.yaml"
    index.write_text(f"production: {repo}\n")
    monkeypatch.setenv("DAF_BUTLER_REPOSITORY_INDEX", str(index))
    for n_stored, (name, file) in enumerate(
        ((repo.as_uri(), warp_files[1]), ("production", warp_files[2])), start=2
    ):
        result = CliRunner().invoke(main, ["ingest", name, str(file)])
        assert result.exit_code == 0, result.output
        assert len(refs(repo)) == n_stored
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.yaml", "repo"]


@pytest.mark.parametrize("run", ["", "*", "u/[a]", "one,two"])
def test_a_collection_that_no_pipeline_could_name(warp_files: list[Path], tmp_path: Path, run: str) -> None:
    repo = tmp_path / "repo"
    message = one_line(ingest(repo, warp_files[0], options=("--run", run)))
    assert f"{run!r} is no name of a collection" in message
    assert not repo.exists()


@pytest.mark.parametrize("content", ["", "datastore: ["])
@pytest.mark.parametrize(
    "words",
    [
        ("ingest-network", "REPO", str(NETWORK)),
        ("finer-skymap", "REPO"),
        ("train", "net", "--repo", "REPO"),
    ],
)
def test_commands_refuse_a_damaged_repository(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    (tmp_path / "butler.yaml").write_text(content)
    result = CliRunner().invoke(main, [str(tmp_path) if one == "REPO" else one for one in words])
    assert f"{tmp_path} cannot be opened as a Butler repository" in one_line(result)


@pytest.mark.parametrize(
    ("words", "dataset_type"),
    [
        (("ingest-network", "REPO", str(NETWORK)), "deep_prior_network"),
        (("finer-skymap", "REPO", "--skymap", "deepprior_sim"), "deep_prior_finer_skymap"),
    ],
)
def test_collections_that_cannot_be_written(
    repo: Path, tmp_path: Path, words: tuple[str, ...], dataset_type: str
) -> None:
    own = tmp_path / "repo"
    shutil.copytree(repo, own)
    command = [str(own) if one == "REPO" else one for one in words]
    with Butler.from_config(own, writeable=True) as butler:
        butler.registry.registerCollection("a/tag")
    message = one_line(CliRunner().invoke(main, [*command, "--run", "a/tag"]))
    assert f"The repository {own} cannot take a" in message
    assert "a/tag" in message
    # What stands where the dataset is to go stops any user.
    (own / "blocked").mkdir()
    (own / "blocked" / dataset_type).write_text("in the way")
    message = one_line(CliRunner().invoke(main, [*command, "--run", "blocked"]))
    assert f"The repository {own} cannot be written: " in message
    assert "blocked" in message


def test_all_patches_of_a_large_skymap_are_copied(tmp_path: Path) -> None:
    """Queries for records end after 20000 of them by default."""
    n_patches = 20_001
    Butler.makeRepo(str(tmp_path))
    with Butler.from_config(tmp_path, writeable=True) as butler:
        insert = butler.registry.insertDimensionData
        insert("skymap", {"name": "large", "hash": b"large"})
        insert("tract", {"skymap": "large", "id": 0})
        insert(
            "patch",
            *(
                {"skymap": "large", "tract": 0, "id": patch, "cell_x": patch, "cell_y": 0}
                for patch in range(n_patches)
            ),
        )
        assert copy_patches(butler, "large", "large_x2") == n_patches
        copies = butler.query_dimension_records("patch", skymap="large_x2", limit=None)
        assert len(copies) == n_patches
