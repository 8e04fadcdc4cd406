"""The OpenAPI document is true and suits client generators."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator, validate

from app import __version__
from app.api.openapi import HEADERS
from app.api.problem_types import ProblemCode
from app.http.problems import INVALID_CHECK
from app.main import create_app
from app.settings import Settings
from tests.conftest import Api
from tests.services import ROOT
from tests.support import AGENT, new_id, session_request

OPERATIONS = {
    "createSession",
    "listSessions",
    "getSession",
    "closeSession",
    "recordCall",
    "recordBatch",
    "getAgent",
    "closeAgentSessions",
    "updateSession",
    "pauseSession",
    "resumeSession",
    "listAgents",
    "freezeAgent",
    "unfreezeAgent",
    "livez",
    "readyz",
    "healthz",
    "metrics",
    "listDenials",
    "getReplica",
    "updateReplica",
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings.model_construct()).framework.openapi()


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def schemas_in(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of the document that is a schema or contains one."""
    if isinstance(node, dict):
        yield node
        for each in node.values():
            yield from schemas_in(each)
    elif isinstance(node, list):
        for each in node:
            yield from schemas_in(each)


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_every_operation_has_a_stable_name(document: dict[str, Any]) -> None:
    assert {each["operationId"] for each in operations(document)} == OPERATIONS


def test_every_operation_has_a_tag_a_summary_and_a_description(
    document: dict[str, Any],
) -> None:
    for operation in operations(document):
        assert operation["tags"]
        assert operation["summary"]
        assert operation["description"]


def test_every_error_is_a_problem_with_an_example(document: dict[str, Any]) -> None:
    for operation in operations(document):
        for status, response in operation["responses"].items():
            if status == "default" or int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"]
                content = response["content"]["application/problem+json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                assert content["examples"]


def test_every_response_and_body_is_a_named_schema(document: dict[str, Any]) -> None:
    for operation in operations(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for body in bodies:
            for kind, content in body.get("content", {}).items():
                assert kind == "text/plain" or list(content["schema"]) == ["$ref"]


def test_every_body_has_an_example(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in (
        "CreateSession",
        "RecordCall",
        "RecordBatch",
        "UpdateReplica",
        "Session",
        "Agent",
        "Denial",
        "Replica",
    ):
        assert schemas[name]["examples"]


def test_nothing_is_null_and_no_integer_is_unbounded(document: dict[str, Any]) -> None:
    for schema in schemas_in(document):
        assert schema.get("type") != "null"
        assert "anyOf" not in schema
        if schema.get("type") == "integer":
            assert schema["format"] == "int32"
            if "description" not in schema or "schema" not in schema:
                assert isinstance(schema.get("minimum"), int), schema
                assert isinstance(schema["maximum"], int), schema


def test_schemas_that_only_fastapi_uses_are_removed(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert "ValidationError" not in document["components"]["schemas"]


def test_the_document_lists_every_code(document: dict[str, Any]) -> None:
    codes = document["components"]["schemas"]["ProblemCode"]["x-extensible-enum"]
    assert codes == [code.value for code in ProblemCode]


def request_parts(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every schema that a client fills in."""
    schemas = document["components"]["schemas"]
    for operation in operations(document):
        for each in operation.get("parameters", []):
            yield each["schema"]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            yield schemas[content["schema"]["$ref"].rpartition("/")[2]]


def test_requests_are_closed_and_have_no_defaults(document: dict[str, Any]) -> None:
    """Generators send defaults, or make the field required."""
    for part in request_parts(document):
        assert all("default" not in each for each in schemas_in(part))
        assert part.get("type") != "object" or part["additionalProperties"] is False
    create = document["components"]["schemas"]["CreateSession"]["properties"]
    assert create["time_limit_secs"]["description"].endswith("Default: 3600.")
    assert create["data_sensitivity_ceiling"]["description"].endswith("Default: internal.")


def test_requests_keep_their_enums(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    listed = document["paths"]["/sessions"]["get"]["parameters"]

    assert "restricted" in schemas["DataSensitivity"]["enum"]
    assert {"$ref": "#/components/schemas/SessionStatus"} in [each["schema"] for each in listed]
    assert "paused" in schemas["SessionStatus"]["enum"]


def test_responses_are_open(document: dict[str, Any]) -> None:
    """A client must not fail at the next version's fields, codes and actions."""
    schemas = document["components"]["schemas"]
    waiting, seen = [operation["responses"] for operation in operations(document)], set()
    while waiting:
        for node in schemas_in(waiting.pop()):
            assert "enum" not in node, node
            name = node.get("$ref", "").removeprefix("#/components/schemas/")
            if name in schemas and name not in seen:
                seen.add(name)
                waiting.append(schemas[name])
                if "properties" in schemas[name]:
                    assert schemas[name]["additionalProperties"] is True, name
    assert {"Session", "Problem", "ProblemCode", "NextAction", "Replica"} <= seen
    problem = schemas["Problem"]
    assert problem["properties"]["code"]["$ref"].endswith("/ProblemCode")
    assert {"code", "retryable", "next_action"} <= set(problem["required"])


def test_required_fields_come_first(document: dict[str, Any]) -> None:
    """Some generators make them positional parameters, in this order."""
    call = document["components"]["schemas"]["RecordCall"]

    assert next(iter(call["properties"])) == "tool_name"


def test_every_operation_describes_every_status_by_its_codes(document: dict[str, Any]) -> None:
    for operation in operations(document):
        named = set()
        for response in operation["responses"].values():
            examples = response.get("content", {}).get("application/problem+json", {})
            for code in examples.get("examples", {}):
                assert f"`{code}`" in response["description"]
                named.add(code)
        assert "default" in operation["responses"]
        assert {"overloaded", "malformed_request", "request_timeout"} <= named


def test_every_code_has_a_full_example(document: dict[str, Any]) -> None:
    examples = document["components"]["examples"]
    schema = {
        "$ref": "#/components/schemas/Problem",
        "components": document["components"],
    }

    # Routes for gateways are not in the document, nor what only they answer.
    outside = {INVALID_CHECK.code}
    assert list(examples) == [code.value for code in ProblemCode if code.value not in outside]
    for code, example in examples.items():
        problem = example["value"]
        jsonschema.validate(problem, schema)
        assert problem["code"] == code
        assert (
            problem.keys() <= document["components"]["schemas"]["Problem"]["properties"].keys()
        )
        waits = {"wait", "retry_with_same_key"}
        assert problem["retryable"] == (problem["next_action"] in waits)


def test_every_operation_has_an_example_answer(document: dict[str, Any]) -> None:
    for operation in operations(document):
        for status in {"200", "201"} & operation["responses"].keys():
            assert operation["responses"][status]["description"] != "Successful Response"
            for content in operation["responses"][status]["content"].values():
                assert content["example"]


def test_every_response_says_its_headers(document: dict[str, Any]) -> None:
    for operation in operations(document):
        for status, response in operation["responses"].items():
            assert "X-Request-Id" in response["headers"]
            assert ("X-Should-Retry" in response["headers"]) == (not status.startswith("2"))
            assert status != "401" or "WWW-Authenticate" in response["headers"]
    call = document["paths"]["/sessions/{session_id}/calls"]["post"]["responses"]
    assert {"RateLimit", "RateLimit-Policy", "Retry-After"} <= call["429"]["headers"].keys()
    assert "Preference-Applied" in call["204"]["headers"]


def test_health_checks_say_that_they_need_no_key(document: dict[str, Any]) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert document["paths"][path]["get"]["security"] == []


def test_the_document_exists_for_tools_that_know_only_3_0() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "app", "openapi", "--spec", "3.0"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    document = json.loads(printed)

    OpenAPIV30SpecValidator(document).validate()
    assert document["openapi"].startswith("3.0.")
    update = document["components"]["schemas"]["UpdateSession"]["properties"]
    assert update["rate_limit_per_minute"]["nullable"] is True
    for each in schemas_in(document):
        assert "$ref" not in each or len(each) == 1
        assert not isinstance(each.get("type"), list)


def test_every_operation_but_health_checks_needs_a_key(document: dict[str, Any]) -> None:
    open_to_all = {
        each["operationId"] for each in operations(document) if not each.get("security")
    }
    assert open_to_all == {"livez", "readyz", "healthz"}


def test_a_created_session_links_to_its_operations(document: dict[str, Any]) -> None:
    created = document["paths"]["/sessions"]["post"]["responses"]["201"]
    assert {"recordCall", "recordBatch", "getSession", "closeSession"} == set(created["links"])
    assert "Location" in created["headers"]


def test_request_headers_are_described(document: dict[str, Any]) -> None:
    call = document["paths"]["/sessions/{session_id}/calls"]["post"]
    names = {parameter["name"] for parameter in call["parameters"]}
    assert names == {"session_id", "dry_run", "Idempotency-Key", "Prefer"}


@pytest.mark.anyio
async def test_real_responses_match_the_document(api: Api, document: dict[str, Any]) -> None:
    session = await api.create(rate_limit_per_minute=1)
    session_id = session["session_id"]
    answers: list[tuple[httpx.Response, str, str]] = [
        (await api.client.get(f"/sessions/{session_id}"), "/sessions/{session_id}", "get"),
        (await api.call(session_id), "/sessions/{session_id}/calls", "post"),
        (await api.call(session_id), "/sessions/{session_id}/calls", "post"),
        (await api.batch(session_id, "rm"), "/sessions/{session_id}/batch", "post"),
        (await api.call(new_id()), "/sessions/{session_id}/calls", "post"),
        (await api.client.post("/sessions", json={}), "/sessions", "post"),
        (await api.client.post("/sessions", json=session_request()), "/sessions", "post"),
        (await api.client.get("/sessions?limit=1"), "/sessions", "get"),
        (await api.client.get(f"/agents/{AGENT}"), "/agents/{agent_id}", "get"),
        (await api.client.get("/livez"), "/livez", "get"),
        (await api.client.get("/denials"), "/denials", "get"),
        (await api.client.get("/replica"), "/replica", "get"),
        (await api.client.patch("/replica", json={"log_level": "info"}), "/replica", "patch"),
        (await api.client.patch("/replica", json={"log_level": "all"}), "/replica", "patch"),
        (await api.client.get("/denials?code=no"), "/denials", "get"),
        (
            await api.client.delete(f"/agents/{AGENT}/sessions"),
            "/agents/{agent_id}/sessions",
            "delete",
        ),
        (
            await api.client.delete(f"/sessions/{session_id}"),
            "/sessions/{session_id}",
            "delete",
        ),
    ]

    for answer, path, method in answers:
        described = document["paths"][path][method]["responses"][str(answer.status_code)]
        (media_type, content) = next(iter(described["content"].items()))
        assert answer.headers["content-type"] == media_type
        schema = {**content["schema"], "components": document["components"]}
        jsonschema.validate(answer.json(), schema)
        name = content["schema"]["$ref"].rpartition("/")[2]
        known = document["components"]["schemas"][name]["properties"]
        assert answer.json().keys() <= known.keys(), (path, answer.json())
        sent = {name for name in HEADERS if name in answer.headers}
        assert sent <= described["headers"].keys(), (path, answer.headers)


def test_a_command_prints_the_committed_document() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "app", "openapi"], capture_output=True, check=True, text=True
    ).stdout

    assert printed == (ROOT / "openapi.json").read_text()
    assert f'"version": "{__version__}"' in printed


@pytest.mark.anyio
async def test_the_root_leads_to_the_documentation(api: Api) -> None:
    answer = await api.client.get("/")

    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


@pytest.mark.anyio
async def test_the_documentation_needs_no_internet(api: Api) -> None:
    page = await api.client.get("/docs")

    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) >= 3
    for source in sources:
        assert source.startswith("/")
        assert (await api.client.get(source)).status_code == 200
    assert "://" not in re.sub(r"<!--.*?-->", "", page.text, flags=re.DOTALL)
