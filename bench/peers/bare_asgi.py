"""The floor of this stack: an ASGI function that reads the body and returns fixed bytes, as
many as the response to an admitted call."""

from __future__ import annotations

from typing import Any

BODY = b'{"session_id":"' + b"x" * 532 + b'"}'
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(BODY)),
]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
