"""Everything that the OpenAPI document allows, and much that it does not: an answer that it describes, and no 5xx."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import TestClient, compute, scan_bytes, send

from sagittal.serve.settings import Limits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode

_EXAMPLES = 12
"""For each address and method, of data that fits and of data that does not."""
_SEARCH = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_SHAPE = {"type", "code", "message"}


@pytest.fixture
def asked(served: Callable[..., TestClient], tmp_path: Any) -> tuple[TestClient, str]:
    """A service with jobs in it, and the id of one that is done."""
    client = served(limits=Limits(queued=10_000, free_bytes=0, upload_bytes=1 << 20))
    for seed in range(2):
        send(client, scan_bytes(seed, folder=tmp_path))
    return client, compute(client).id


def _sent(client: TestClient, case: Any) -> Any:
    """Send a case as its own library would, through the application without a socket."""
    given = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    body = given.body
    content = body.read() if isinstance(body, io.IOBase) else body
    headers = {name: value.encode("latin-1", "replace") if isinstance(value, str) else value
               for name, value in given.headers.items()}  # fmt: skip
    return client.request(given.method or "GET", str(given.url), content=content or b"", headers=headers)


def _answers(client: TestClient, operation: Any, mode: GenerationMode, done: str) -> set[int]:
    """Ask one address in many ways, look at each answer, and return the statuses."""
    described = {int(code) for code in operation.definition.raw["responses"] if code.isdigit()}
    seen: set[int] = set()

    @_SEARCH
    @given(case=operation.as_strategy(generation_mode=mode), is_real=st.booleans())
    def ask(case: Any, is_real: bool) -> None:
        if is_real and "job_id" in (case.path_parameters or {}):
            case.path_parameters["job_id"] = done
        answer = _sent(client, case)
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json().keys() == {"error"} and answer.json()["error"].keys() == _SHAPE
        else:
            assert answer.status_code in described, f"{case.method} {case.path}: {answer.status_code}"

    ask()
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_request_that_the_document_describes_or_forbids_ends_in_a_5xx(asked: tuple[TestClient, str]) -> None:
    client, done = asked
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                seen = _answers(client, operation, mode, done)
            except hypothesis.errors.Unsatisfiable:
                continue  # a request without parameters can't be sent wrongly
            statuses.setdefault(f"{operation.method} {operation.path}", set()).update(seen)
    # The search went deeper than the door.
    assert {200, 422} <= statuses["get /api/v1/jobs"] and 200 in statuses["get /api/v1/jobs/{job_id}"]
    assert statuses["get /ready"] == {200} and max(statuses["post /api/v1/jobs"]) in (415, 422)
