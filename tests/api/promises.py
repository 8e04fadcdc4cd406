"""What an OpenAPI document promises to clients, one line each.

After a release `python -m tests.api.promises > tests/api/promises.txt` records its promises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from tests.services import ROOT

_REF = "#/components/schemas/"


def promises(document: dict[str, Any]) -> set[str]:
    """Return a line for everything that clients can rely on.

    `takes` and `gives` are what a request may have and what a response has; neither may go
    away. `requires` is what a request must have, which may not grow.
    """
    schemas: dict[str, Any] = document["components"]["schemas"]
    lines = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = operation["operationId"]
            lines.add(f"gives {name} {method.upper()} {path}")
            for each in operation.get("parameters", []):
                field = f"{name} {each['in']} {each['name']}"
                lines |= set(_value("takes", field, each["schema"], schemas))
                if each.get("required"):
                    lines.add(f"requires {field}")
            body = operation.get("requestBody", {})
            if body.get("required"):
                lines.add(f"requires {name} body")
            for content in body.get("content", {}).values():
                lines |= set(_fields("takes", f"{name} body", content["schema"], schemas))
            for status, response in operation["responses"].items():
                lines.add(f"gives {name} {status}")
                for header in response.get("headers", {}):
                    lines.add(f"gives {name} {status} header {header}")
                for content in response.get("content", {}).values():
                    # Every problem has the same fields.
                    where = f"{name} {status}" if status.startswith("2") else "problem"
                    lines |= set(_fields("gives", where, content["schema"], schemas))
    return lines


def _fields(
    verb: str, where: str, schema: dict[str, Any], schemas: dict[str, Any]
) -> Iterator[str]:
    target = _resolved(schema, schemas)
    for field, value in target.get("properties", {}).items():
        here = f"{where} {field}"
        if field in target.get("required", []):
            yield f"{'requires' if verb == 'takes' else 'gives'} {here} always"
        yield from _value(verb, here, value, schemas)


def _value(
    verb: str, where: str, schema: dict[str, Any], schemas: dict[str, Any]
) -> Iterator[str]:
    target = _resolved(schema, schemas)
    yield f"{verb} {where}: {target['type']} {target.get('format', '')}".rstrip()
    for value in target.get("enum", target.get("x-extensible-enum", [])):
        yield f"{verb} {where} = {value}"
    if target["type"] == "array":
        yield from _value(verb, f"{where}[]", target["items"], schemas)
    if "properties" in target:
        yield from _fields(verb, where, target, schemas)


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix(_REF)
    target: dict[str, Any] = schemas[name] if name else schema
    return target


def breaks(before: set[str], after: set[str]) -> set[str]:
    """Return what would break a client that relies on the lines of `before`."""
    operations = {line.split()[1] for line in before if line.startswith("gives")}
    gone = {line for line in before - after if not line.startswith("requires")}
    demanded = {
        line
        for line in after - before
        if line.startswith("requires") and line.split()[1] in operations
    }
    return gone | demanded


if __name__ == "__main__":
    lines = sorted(promises(json.loads((ROOT / "openapi.json").read_text())))
    sys.stdout.writelines(f"{line}\n" for line in lines)
