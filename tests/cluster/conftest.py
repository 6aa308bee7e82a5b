"""What tests of this room share: a SLURM of this machine, and a server that speaks S3."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm_site import SlurmSite, missing, slurm_site


@pytest.fixture(scope="session")
def _slurm_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    reason = missing()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm_site(tmp_path_factory.mktemp("slurm") / "site") as site:
        yield site


@pytest.fixture
def slurm(_slurm_site: SlurmSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmSite]:
    """A SLURM that runs on this machine, with an empty queue; without it the test is skipped, except under CI."""
    monkeypatch.setenv("SLURM_CONF", str(_slurm_site.configuration))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _slurm_site.empty()
    yield _slurm_site
    _slurm_site.empty()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a server of this machine, as s3://BUCKET/FOLDER."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="scans")
        # Connections are kept by address of the bucket, and another module has another server.
        S3FileSystem.clear_instance_cache()
        yield "s3://scans/some/where"
        S3FileSystem.clear_instance_cache()
        server.stop()
