# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The package as it is installed: by pip from a wheel, as a source tree, by EUPS, and by `make setup`."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lsst.coadd.deepprior
from lsst.pipe.base import Pipeline

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIPELINE = "$COADD_DEEPPRIOR_DIR/pipelines/deepPriorCoadd.yaml"
SOURCE_FOLDERS = ("benchmarks", "config", "pipelines", "tests", "tools")
LABELS = {"deepPriorCoadd", "measureDeepPriorCoadd", "plotDeepPriorCoadd"}


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)


def dependencies() -> set[str]:
    return {re.match(r"[\w-]+", d)[0] for d in PROJECT["dependencies"]}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Return a wheel and a source archive, built from a copy of the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("python", *SOURCE_FOLDERS):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", ".*")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "COPYRIGHT", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta as b; print(b.build_wheel('.')); print(b.build_sdist('.'))"
    built = run(sys.executable, "-c", build, cwd=source)
    assert built.returncode == 0, built.stderr
    return [source / line for line in built.stdout.splitlines() if line.endswith((".whl", ".tar.gz"))]


@pytest.fixture
def wheel(archives):
    return archives[0]


def test_version():
    assert lsst.coadd.deepprior.__version__ in (PROJECT["version"], "0.0.0+unknown")


@pytest.mark.parametrize("directory", [None, str(ROOT)])
def test_pipeline_is_found_with_and_without_eups(directory, monkeypatch):
    if directory is None:
        monkeypatch.delenv("COADD_DEEPPRIOR_DIR", raising=False)
    else:
        monkeypatch.setenv("COADD_DEEPPRIOR_DIR", directory)
    assert set(Pipeline.from_uri(PIPELINE).task_labels) == LABELS
    # Its imports and the camera's config file are found by the same variable.
    camera = PIPELINE.replace("deepPriorCoadd.yaml", "LSSTCam/DRP-deepPrior.yaml")
    assert set(Pipeline.from_uri(camera).task_labels) > LABELS


def test_pipelines_can_share_a_repository():
    """Tasks of one label write their metadata under one name, whose dimensions a repository knows once."""
    dimensions = {}
    for path in sorted((ROOT / "pipelines").glob("*DeepPriorCoadd.yaml")) + [
        ROOT / "pipelines/refinePsfs.yaml"
    ]:
        for label, task in Pipeline.from_uri(path.as_uri()).to_graph().tasks.items():
            assert dimensions.setdefault(label, task.raw_dimensions) == task.raw_dimensions, (path, label)
    assert len(dimensions) == 4


def test_wheel_leaves_the_shared_namespace_alone(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert "lsst/__init__.py" not in files
    assert "lsst/coadd/deepprior/py.typed" in files
    for folder in ("config", "pipelines"):
        here = {f"{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*") if p.is_file()}
        prefix = "lsst/coadd/deepprior/resources/"
        assert here
        assert here == {f.removeprefix(prefix) for f in files if f.startswith(prefix + folder)}


def test_source_archive_has_the_tests_and_what_they_read(archives):
    with tarfile.open(archives[1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    for folder in SOURCE_FOLDERS:
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        here = {path for path in here if not re.search(r"/(\.|__pycache__)", str(path))}
        assert here
        assert set(map(str, here)) <= files
        assert not any(name.startswith(f"{folder}/.") for name in files)
    assert "python/lsst/__init__.py" in files


def test_pipeline_is_found_in_a_wheel(wheel, tmp_path, monkeypatch):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import lsst.images, lsst.coadd.deepprior as package\n"
        "from lsst.pipe.base import Pipeline\n"
        f"print(package.__file__, *Pipeline.from_uri({PIPELINE!r}).task_labels)"
    )
    monkeypatch.delenv("COADD_DEEPPRIOR_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, *labels = result.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert set(labels) == LABELS


def test_dependencies_are_those_that_are_imported():
    modules = set()
    for path in (ROOT / "python/lsst/coadd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
    # Distributions of LSST are named after their module, lsst.pipe.base by two parts and lsst.images by one.
    distributions = {name: names[0].lower() for name, names in packages_distributions().items()}
    used = {"lsst-ctrl-mpexec", "pyarrow"}  # pipetask, and what the Butler needs for ArrowAstropy catalogues
    for module in modules:
        package, *rest = module.split(".")
        if package == "lsst" and rest[0] != "coadd":
            used.add("-".join(["lsst", *rest[: 1 if rest[0] in ("images", "sphgeom", "utils") else 2]]))
        elif package != "lsst" and package not in sys.stdlib_module_names:
            used.add(distributions[package])
    assert used == dependencies()


def test_eups_table_requires_the_lsst_packages():
    table = (ROOT / "ups/coadd_deepprior.table").read_text()
    required = set(re.findall(r"setupRequired\((\w+)\)", table))
    needed = {d.removeprefix("lsst-").replace("-", "_") for d in dependencies() if d.startswith("lsst-")}
    assert required == needed | {"base"}


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"pip install"*) echo "$PIP_SAYS" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Return a function that runs the set-up script of a source tree without .venv, in a faked machine."""
    tree, commands = tmp_path / "source tree", tmp_path / "bin"
    for path in ("tools/make_venv.sh", "pyproject.toml"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)
    commands.mkdir()
    for name in ("awk", "cat", "cp", "dirname", "grep", "mkdir", "rm", "sh", "tail", "touch"):
        (commands / name).symlink_to(shutil.which(name))

    def run_setup(*, free_gib=100, python=None, **environment):
        fakes = {
            "df": f"#!/bin/sh\necho head\necho disk 0 0 {free_gib * 1048576} 0 /\n",
            "python3.12": python,
        }
        for name, text in fakes.items():
            if text is not None:
                (commands / name).write_text(text)
                (commands / name).chmod(0o755)
        # The fake python runs as .venv/bin/python too.
        result = run(
            "sh",
            tree / "tools/make_venv.sh",
            env={"PATH": str(commands), "HOME": str(tmp_path), **environment},
        )
        return result, tree / ".venv"

    return run_setup


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        ({}, "no Python 3.12, 3.13 or 3.14"),
        ({"python": "#!/bin/sh\nexit 1\n"}, "no Python 3.12, 3.13 or 3.14"),
        ({"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python is not a Python 3.12"),
        ({"python": FAKE_PYTHON, "free_gib": 3}, "needs about 10 GiB"),
        (
            {"python": FAKE_PYTHON, "PIP_SAYS": "OSError: [Errno 28] No space left on device"},
            "the disk is full",
        ),
        (
            {"python": FAKE_PYTHON, "PIP_SAYS": "ERROR: No matching distribution"},
            "pip failed with 'ERROR: No mat",
        ),
    ],
)
def test_setup_fails_with_one_clear_sentence(setup, situation, sentence):
    result, venv = setup(**situation)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("setup: ")
    assert sentence in line
    assert not (venv / ".stamp").exists()


def test_setup_without_network_names_pips_log(setup):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    result, venv = setup(PYTHON=sys.executable, **nowhere)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "cannot reach the package index" in line
    assert str(venv / "pip.log") in line
    assert "127.0.0.1" in (venv / "pip.log").read_text()


def test_setup_repairs_an_interrupted_one_and_updates_a_complete_one(setup):
    works = FAKE_PYTHON.replace("exit 1", 'echo "$*" >> .venv/installs')
    _, venv = setup(python=works, PIP_SAYS="")
    assert (venv / ".stamp").exists()
    assert not (venv / ".unfinished").exists()

    (venv / ".unfinished").write_text("")
    (venv / "half-made").touch()
    result, _ = setup()
    assert "did not finish: starting again" in result.stdout
    assert (venv / ".stamp").exists()
    assert not (venv / "half-made").exists()

    result, _ = setup()
    assert "updating .venv" in result.stdout
    assert len((venv / "installs").read_text().splitlines()) == 2
