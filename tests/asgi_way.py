"""The service with `send` wrapped, so that every response takes the way of ASGI messages."""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from app.main import app as served


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    async def wrapped(message: Message) -> None:
        await send(message)

    await served(scope, receive, wrapped)
