# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The demo on the form that repositories have in production: a PostgreSQL registry and an S3 datastore."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import click.testing
import pytest
import yaml
from moto.server import ThreadedMotoServer

from lsst.coadd.deepprior import demo
from lsst.daf.butler import Butler

SCRIPT = Path(__file__).with_name("postgres.sh")


@pytest.fixture
def registry() -> Iterator[str]:
    """A PostgreSQL server with an empty database."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), shutil.which("initdb")]
    if not any(folders):
        pytest.skip("a PostgreSQL registry needs initdb: 'apt-get install postgresql' as root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the server has a user of its own
        data = f"{folder}/postgres"
        try:
            subprocess.run(["sh", SCRIPT, "start", data, str(port)], check=True, timeout=60)
            yield f"postgresql://butler@127.0.0.1:{port}/repo"
        finally:
            subprocess.run(["sh", SCRIPT, "stop", data], check=True, timeout=60)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="deepprior")
        yield "s3://deepprior/demo"
    finally:
        server.stop()


def test_demo_on_postgresql_and_s3(
    registry: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three patches, whose quanta write at the same time; all that is stored is in the bucket."""
    seed = tmp_path / "seed.yaml"
    seed.write_text(yaml.safe_dump({"registry": {"db": registry}, "datastore": {"root": bucket}}))
    create = [
        str(Path(sys.executable).with_name("butler")),
        "create",
        "--seed-config",
        str(seed),
        "--override",
    ]
    repo = tmp_path / "demo" / "repo"
    subprocess.run([*create, str(repo)], check=True, timeout=120)

    monkeypatch.setattr(demo, "_PATCHES", 3)
    monkeypatch.setattr(demo, "_BANDS", ("r",))
    monkeypatch.setattr(demo, "_VISITS", 3)
    monkeypatch.setattr(demo, "_n_processes", lambda: 3)
    run = demo._run

    def quick(command: str, *arguments: str | Path) -> None:
        extra = {
            "simulate": ("--cells", "1", "2", "--seed", "3"),
            "run": tuple(
                part
                for setting in ("n_variance_draws=1", "base_steps=10", "n_splits=2", "steps=2")
                for part in ("-c", f"deepPriorCoadd:{setting}")
            ),
        }.get(str(arguments[0]), ())
        run(command, *arguments, *extra)

    monkeypatch.setattr(demo, "_run", quick)
    result = click.testing.CliRunner().invoke(demo.main, [str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert result.output.count(f"{bucket}/u/demo/deepprior/") == 3 * len(demo._DATASETS)
    with Butler.from_config(repo, collections=demo._OUTPUT) as butler:
        for name in set(demo._DATASETS) - {"deep_prior_coadd_plot"}:
            refs = butler.query_datasets(name)
            assert {ref.dataId["patch"] for ref in refs} == {0, 1, 2}
            for ref in refs:
                butler.get(ref)
    assert [path.name for path in repo.iterdir()] == ["butler.yaml"]
