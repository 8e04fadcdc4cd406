"""Builds the OpenAPI document: FastAPI's, changed so that generated clients work unchanged.

The models validate requests and are not touched. The document promises only what
clients may rely on.

- Requests are closed, and have no defaults: generators would send them, and a server with a
  lower maximum would refuse them. The description says what holds if a field is absent.
- Responses are open: a client that refuses an unknown field or value would fail at the next
  version. Values that a later version can add to are strings with `x-extensible-enum`.
- Every operation has a `default` response, so that clients read any error as a problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.openapi import HEADERS, Problem, headers_named, problem_examples

TAGS = [
    {"name": "sessions", "description": "Issue, change and end task sessions."},
    {"name": "admission", "description": "Ask before each tool call, and count it."},
    {"name": "agents", "description": "Freeze an agent, and close all of its sessions."},
    {"name": "operations", "description": "Health, metrics, and what a replica knows."},
]

_DESCRIPTION = """\
Before an agent proxy lets a tool call through, it asks here: may this session make this
call now? If so, the call is counted in the same atomic step. A denial changes nothing.

Every error is an RFC 9457 problem. Programs should act on `code`. `agent_message` is safe
to show to the agent.

Later versions can add fields, codes and other values to responses. Clients must ignore
fields and deny on codes that they do not know.
"""

_REF = "#/components/schemas/"


def build_document(app: FastAPI) -> dict[str, Any]:
    """Build the OpenAPI document of `app`."""
    document = get_openapi(
        title="Arbiter",
        version=app.version,
        summary="Task sessions that limit what an AI agent may do.",
        description=_DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        servers=[{"url": "/", "description": "The service that serves this document."}],
        contact={"name": "The Arbiter authors"},
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        separate_input_output_schemas=False,
    )
    components = document["components"]
    schemas: dict[str, Any] = components["schemas"]
    for generated in ("HTTPValidationError", "ValidationError"):
        schemas.pop(generated, None)
    problem = Problem.model_json_schema(ref_template=f"{_REF}{{model}}")
    schemas |= problem.pop("$defs")
    schemas["Problem"] = problem
    _tidy(document)
    operations = [each for path in document["paths"].values() for each in path.values()]
    asked = _reachable(schemas, *map(_request, operations))
    answered = _reachable(schemas, *map(_responses, operations))
    for operation in operations:
        _describe_request(operation)
        _describe_responses(operation, schemas)
    for name in asked:
        _close(schemas[name])
    for name in answered - asked:
        _open(schemas[name], schemas, asked)
    components["schemas"] = dict(sorted(schemas.items()))
    components["headers"] = HEADERS
    # Codes of routes that are not in the document have none here.
    told = str(document["paths"])
    components["examples"] = {
        name: example
        for name, example in problem_examples().items()
        if f"#/components/examples/{name}'" in told
    }
    components["securitySchemes"] = {
        "apiKey": {
            "type": "http",
            "scheme": "bearer",
            "description": "`<name>.<secret>`, made by `arbiter keys new`.",
        }
    }
    return document


def _tidy(node: Any) -> None:
    """Declare optional fields absent rather than null, and bounds of integers as integers."""
    if isinstance(node, list):
        for each in node:
            _tidy(each)
    elif isinstance(node, dict):
        if "anyOf" in node:
            (only,) = (kind for kind in node.pop("anyOf") if kind != {"type": "null"})
            node |= only
            node.pop("default", None)
        if node.pop("nullable", False):
            node["type"] = [node["type"], "null"]
        for key, value in node.items():
            if key in ("minimum", "maximum"):
                node[key] = int(value)
            _tidy(value)


def _request(operation: dict[str, Any]) -> list[Any]:
    return [operation.get("parameters"), operation.get("requestBody")]


def _responses(operation: dict[str, Any]) -> Any:
    return operation["responses"]


def _reachable(schemas: dict[str, Any], *roots: Any) -> set[str]:
    """Return the names of the schemas that `roots` refer to, directly or not."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        for ref in _references(waiting.pop()):
            name = ref.removeprefix(_REF)
            if name in schemas and name not in found:
                found.add(name)
                waiting.append(schemas[name])
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _references(each)
    elif isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for each in node.values():
            yield from _references(each)


def _describe_request(operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        _say_default(schema)
        parameter["description"] = schema.pop("description", parameter.get("description", ""))
        # Beside a reference a title makes some generators declare the type once more.
        schema.pop("title", None)
    for content in operation.get("requestBody", {}).get("content", {}).values():
        # FastAPI would spell out the model that stands for no body.
        content["schema"].pop("default", None)


def _describe_responses(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    for response in operation["responses"].values():
        headers = response.get("headers", {}) | headers_named("X-Request-Id")
        response["headers"] = dict(sorted(headers.items()))
        content = response.get("content", {}).get("application/json")
        if content is not None:
            schema = schemas[content["schema"]["$ref"].removeprefix(_REF)]
            content["example"] = _example(schema, schemas)
            if response["description"] == _NOT_DESCRIBED:
                response["description"] = schema["description"]


_NOT_DESCRIBED = "Successful Response"
"""FastAPI's description of a response that the route does not describe."""


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """The example of a schema. That of a page has one item."""
    if "items" in schema["properties"]:
        item = schema["properties"]["items"]["items"]["$ref"].removeprefix(_REF)
        return {"items": [_example(schemas[item], schemas)]}
    return deepcopy(schema["examples"][0])


def _close(schema: dict[str, Any]) -> None:
    """Describe the schema of a request: no defaults, and the required fields first."""
    fields = schema.get("properties", {})
    for field in fields.values():
        _say_default(field)
    required = schema.get("required", [])
    order = sorted(fields, key=lambda name: name not in required)
    if fields:
        schema["properties"] = {name: fields[name] for name in order}


def _say_default(schema: dict[str, Any]) -> None:
    """Move a default to the description. One that is empty goes without saying."""
    default = schema.pop("default", None)
    if default not in (None, "", []):
        said = str(default).lower() if isinstance(default, bool) else default
        schema["description"] = f"{schema['description']} Default: {said}."


def _open(schema: dict[str, Any], schemas: dict[str, Any], asked: set[str]) -> None:
    """Describe the schema of a response, to which a later version can add."""
    if "properties" in schema:
        schema["additionalProperties"] = True
        for field in schema["properties"].values():
            # A member that is absent does not apply, and has no value.
            field.pop("default", None)
            name = field.get("$ref", "").removeprefix(_REF)
            # Requests need the closed form under this name.
            if name in asked and "enum" in schemas[name]:
                del field["$ref"]
                field |= {"type": "string", "enum": schemas[name]["enum"]}
            _extensible(field)
    _extensible(schema)


def _extensible(schema: dict[str, Any]) -> None:
    if "enum" in schema:
        values = schema.pop("enum")
        schema["x-extensible-enum"] = values
        said = f"A later version can add to these values: {', '.join(values)}."
        schema["description"] = f"{schema.get('description', '')} {said}".strip()


def for_openapi_3_0(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document as OpenAPI 3.0, for tools that do not know 3.1."""
    older: dict[str, Any] = _older(document)
    older["openapi"] = "3.0.3"
    del older["info"]["summary"]
    # 3.0 has no identifier of a license.
    older["info"]["license"] = {
        "name": "Apache-2.0",
        "url": "https://www.apache.org/licenses/LICENSE-2.0",
    }
    return older


def _older(node: Any) -> Any:
    if isinstance(node, list):
        return [_older(each) for each in node]
    if not isinstance(node, dict):
        return node
    # Examples are data, in which these words have no meaning.
    older = {
        key: value if key in ("example", "value") else _older(value)
        for key, value in node.items()
    }
    if isinstance(older.get("examples"), list):
        older["example"] = older.pop("examples")[0]
    match older.get("type"):
        case [kind, "null"]:
            older |= {"type": kind, "nullable": True}
    if "$ref" in older and len(older) > 1:
        # In 3.0 nothing beside a reference is read.
        older["allOf"] = [{"$ref": older.pop("$ref")}]
    return older
