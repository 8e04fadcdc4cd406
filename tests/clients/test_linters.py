"""The linters that users run on OpenAPI documents find nothing in ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.api.document import for_openapi_3_0
from tests.clients.tools import HERE, node_modules, run
from tests.services import ROOT


@pytest.fixture(params=["3.1", "3.0"])
def document(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    written = ROOT / "openapi.json"
    if request.param == "3.0":
        older = tmp_path / "openapi.json"
        older.write_text(json.dumps(for_openapi_3_0(json.loads(written.read_text()))))
        written = older
    return written


def test_spectral_finds_nothing(document: Path) -> None:
    spectral = node_modules() / ".bin" / "spectral"

    found = run(spectral, "lint", "--format", "json", "--ruleset", "spectral.yaml", document)

    # It says so in words after the list.
    assert found.startswith("[]"), found


def test_redocly_finds_nothing(document: Path) -> None:
    redocly = node_modules() / ".bin" / "redocly"

    found = run(redocly, "lint", "--format", "json", "--config", "redocly.yaml", document)

    assert json.loads(found)["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}, found


def test_no_lock_file_names_a_registry() -> None:
    for name in ("package-lock.json", "requirements.lock"):
        text = (HERE / name).read_text()
        assert "resolved" not in text
        assert "index-url" not in text
    packages = json.loads((HERE / "package-lock.json").read_text())["packages"]
    assert all("integrity" in each for name, each in packages.items() if name)
