"""The service on a server without extensions: every response is sent as ASGI messages."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from app.main import app as served


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await served({**scope, "extensions": {}}, receive, send)
