"""The routes for programs against their own OpenAPI document, with whatever it allows and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from engine import Engine, Settings
from tests.helpers.api_server import api_server, wait_until_idle
from web.programs import build

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DOCUMENT: dict[str, Any] = build(Engine()).openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [
    (path, method.upper(), mode)
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    for mode in GenerationMode
    if method == "post" or (mode is GenerationMode.POSITIVE and "{" in path)  # a GET takes nothing that could be wrong
]


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """A server whose queue has no place: what is possible is refused with 429, and nothing is drawn."""
    with api_server(Engine(Settings(weights="mini", device="cpu", queue_limit=0), engine.worker)) as served:
        yield served


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_no_request_breaks_a_route(address: str, path: str, method: str, mode: GenerationMode) -> None:
    @given(SCHEMA[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=address, checks=CHECKS, timeout=60)

    ask()


def test_what_is_answered_is_as_documented(engine: Engine) -> None:
    small = Engine(Settings(weights="mini", device="cpu", queue_limit=1), engine.worker)
    body = {"prompt": "a fox", "steps": 100, "model": "base", "mode": "generate"}
    with api_server(small) as address:
        sent = httpx.post(f"{address}/jobs", json=body, timeout=60)
        SCHEMA["/jobs"]["POST"].validate_response(sent)
        for path, method in (("/jobs/{id}", "GET"), ("/jobs/{id}", "DELETE"), ("/jobs/{id}", "GET")):
            case = SCHEMA[path][method].Case(path_parameters={"id": sent.json()["id"]})
            answer = case.call_and_validate(base_url=address, checks=CHECKS, timeout=60)
            assert answer.status_code == 200
        wait_until_idle(small)
        for path in ("/jobs", "/models"):
            SCHEMA[path]["GET"].Case().call_and_validate(base_url=address, checks=CHECKS, timeout=60)
