"""The committed OpenAPI document is served, and keeps what the last release promised."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.api.promises import breaks, promises
from tests.conftest import Api
from tests.services import ROOT

COMMITTED: dict[str, Any] = json.loads((ROOT / "openapi.json").read_text())
RELEASED = set((Path(__file__).parent / "promises.txt").read_text().splitlines())


@pytest.mark.anyio
async def test_the_committed_document_is_served(api: Api) -> None:
    served = (await api.client.get("/openapi.json")).json()

    assert served == COMMITTED, "make openapi renews openapi.json"


def test_what_the_last_release_promised_is_kept() -> None:
    """A change that breaks clients says so in the changelog, with the word breaking."""
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("\n## [")[1]
    if re.search(r"\bbreaking\b", unreleased, re.IGNORECASE):
        return

    assert breaks(RELEASED, promises(COMMITTED)) == set()


def changed(*path: str, to: Any = None) -> set[str]:
    """Return what is broken if a part of the document is removed or replaced."""
    document = deepcopy(COMMITTED)
    node = document
    for key in path[:-1]:
        node = node[key]
    if to is None:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return breaks(promises(COMMITTED), promises(document))


def test_what_breaks_clients_is_noticed() -> None:
    schemas = COMMITTED["components"]["schemas"]
    codes = schemas["ProblemCode"]["x-extensible-enum"]
    call = ("components", "schemas", "RecordCall")
    open_codes = ("components", "schemas", "ProblemCode", "x-extensible-enum")

    assert changed("paths", "/replica", "patch")
    assert changed("components", "schemas", "Session", "properties", "calls_made")
    assert changed(
        "components", "schemas", "Session", "properties", "calls_made", "type", to="n"
    )
    assert changed(*call, "properties", "agent_id")
    assert changed(*open_codes, to=codes[1:])
    assert changed(*call, "required", to=["tool_name", "agent_id"])


def test_what_clients_can_ignore_breaks_nothing() -> None:
    schemas = COMMITTED["components"]["schemas"]
    codes = schemas["ProblemCode"]["x-extensible-enum"]
    fields = schemas["Session"]["properties"] | {"colour": {"type": "string"}}
    open_codes = ("components", "schemas", "ProblemCode", "x-extensible-enum")

    assert changed(*open_codes, to=[*codes, "another"]) == set()
    assert changed("components", "schemas", "Session", "properties", to=fields) == set()
    assert (
        changed("components", "schemas", "CreateSession", "required", to=["agent_id"]) == set()
    )
