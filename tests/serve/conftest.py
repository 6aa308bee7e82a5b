"""A tiny bundle, a scan, and a service whose jobs nobody computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TINY, NobodyWorks, TestClient, scan_bytes

from sagittal.bundle import read_bundle
from sagittal.serve.app import create_app
from sagittal.serve.settings import Limits, ServeSettings
from sagittal.testing.bundle import write_untrained_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_bundle(tmp_path_factory.mktemp("serve") / "tiny", "mednext-s", 3, settings=TINY)


@pytest.fixture(scope="session")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return scan_bytes(folder=tmp_path_factory.mktemp("scan"))


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    limits = Limits(upload_bytes=1 << 20, unpacked_bytes=4 << 20, files=20, queued=4, free_bytes=0)
    return ServeSettings(folder=tmp_path / "serve", limits=limits)


@pytest.fixture
def served(settings: ServeSettings, tiny_bundle: Path) -> Iterator[Callable[..., TestClient]]:
    """What makes clients of a service whose settings differ in what is given."""
    opened: list[TestClient] = []

    def make(**changes: Any) -> TestClient:
        app = create_app(settings.replace(**changes), [read_bundle(tiny_bundle)], supervisor=NobodyWorks())
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        opened.append(client)
        client.__enter__()
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(served: Callable[..., TestClient]) -> TestClient:
    return served()
