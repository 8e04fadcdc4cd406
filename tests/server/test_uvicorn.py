"""The internals of uvicorn that `app.server` relies on, and the connection that it replaces.

A failure means that uvicorn has changed one of them: read the change, check that our code still
does what it should, and put the new digest here.
"""

from __future__ import annotations

import inspect
from hashlib import sha256

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import Server

LEANT_ON = {
    HttpToolsProtocol: "18fdf324b11bf160",
    RequestResponseCycle: "e67d470d435dcc1c",
    FlowControl: "126debcdaa894c83",
    Server.shutdown: "9b33c50562992b1e",
}


@pytest.mark.parametrize(
    ("part", "digest"), LEANT_ON.items(), ids=lambda part: getattr(part, "__qualname__", "")
)
def test_uvicorn_is_the_reviewed_one(part: object, digest: str) -> None:
    source = inspect.getsource(part)  # type: ignore[arg-type]

    assert sha256(source.encode()).hexdigest()[:16] == digest
