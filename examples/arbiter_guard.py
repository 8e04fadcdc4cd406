"""A guard around tool calls, for Python proxies. Copy this file; it needs only httpx.

    async with (
        httpx.AsyncClient(base_url="http://127.0.0.1:8000", timeout=5) as client,
        Arbiter(client).session(
            agent_id="7c9e6679-7425-40de-944b-e07fc1f90ae7",
            declared_intent="tidy up the notes",
            authorized_tools=["read_note", "list_*"],
        ) as session,
    ):
        async with session.call("read_note"):
            ...  # Runs only if Arbiter admitted the call, and counted it.

- It fails closed: whatever is not an admission raises `NotAdmitted`.
- Every creation and every call has an idempotency key of its own, which all attempts at it
  share. A call whose answer was lost is charged once.
- A request is repeated only if its answer says that this can help, or if there was no answer,
  and only within the caller's patience.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

MAX_ATTEMPTS = 4
MAX_BATCH = 256
FIRST_BACKOFF_SECS = 0.2
TOOL_NAME = re.compile(r"[A-Za-z0-9_./:@-]{1,128}")
"""A name outside this grammar is on no allow-list."""

_REPEATING_HELPS = ("wait", "retry_with_same_key")
_NOTHING_TO_CLOSE = ("session_closed", "session_not_found", "insufficient_scope")


class NotAdmitted(Exception):
    """The call was not admitted and must not be made. Either `Denied` or `Unavailable`.

    `code` and `next_action` are for programs; later servers can send values unknown today.
    `agent_message` is a sentence for the agent, if there is one. `problem` is the whole answer.
    """

    def __init__(self, problem: Mapping[str, Any]) -> None:
        wait, message = str(problem.get("retry_after_secs")), problem.get("agent_message")
        self.problem = problem
        self.code = str(problem["code"])
        self.title = str(problem.get("title", self.code))
        self.next_action = str(problem.get("next_action", "stop"))
        self.retryable = problem.get("retryable") is True
        self.retry_after_secs = int(wait) if wait.isdecimal() else None
        self.violations = [dict(each) for each in problem.get("violations", ())]
        self.agent_message = None if message is None else str(message)
        self.request_id = str(problem.get("request_id", ""))
        super().__init__(f"{self.code}: {problem.get('detail', self.title)}")


class Denied(NotAdmitted):
    """Arbiter said no."""


class Unavailable(NotAdmitted):
    """Nobody could decide, and the call may have been counted.

    `code` is `no_answer` if none came in time, and `not_understood` if it made no sense.
    """


@dataclass(frozen=True)
class Arbiter:
    """The service that `client` talks to; its timeouts bound each attempt.

    `patience_secs` bounds a request with all its attempts and waits. A wait that Arbiter asks
    for is never cut short: if it is longer than the patience, the request fails at once.
    Tests replace `sleep` and `now`, which count in seconds.
    """

    client: httpx.AsyncClient
    patience_secs: float = 10
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    now: Callable[[], float] = time.monotonic

    @asynccontextmanager
    async def session(
        self,
        *,
        agent_id: str,
        declared_intent: str,
        authorized_tools: Iterable[str],
        **terms: Any,
    ) -> AsyncIterator[Session]:
        """Open a session, with more `terms` if need be, and close it at the end.

        Raises `Denied` or `Unavailable` if none could be opened.
        """
        terms |= {"agent_id": agent_id, "declared_intent": declared_intent}
        terms |= {"authorized_tools": list(authorized_tools)}
        created = await self.ask("POST", "/sessions", terms, expected=201)
        session = Session(self, created["session_id"], agent_id)
        try:
            yield session
        finally:
            await session.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        expected: int = 200,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Return the session that Arbiter answers with, after repeating the request as advised.

        Raises `Denied` or `Unavailable` if the last answer is not `expected` with a session.
        """
        request = self.client.build_request(
            method,
            path,
            # In ASCII, which can express any name that an agent thinks up.
            content=None if body is None else json.dumps(body),
            headers={"content-type": "application/json"},
            params={"dry_run": "true"} if dry_run else None,
        )
        if not dry_run:
            request.headers["idempotency-key"] = str(uuid.uuid4())
        gives_up_at = self.now() + self.patience_secs
        attempt = 1
        while True:
            answer = await self._attempt(request, expected, gives_up_at - self.now())
            if not isinstance(answer, NotAdmitted):
                return answer
            wait: float | None = answer.retry_after_secs
            if wait is None:
                spread = random.uniform(0.5, 1)  # noqa: S311  # It guards no secret.
                wait = FIRST_BACKOFF_SECS * 2 ** (attempt - 1) * spread
            decided = dry_run and answer.violations
            helps = answer.retryable and answer.next_action in _REPEATING_HELPS
            in_time = attempt < MAX_ATTEMPTS and self.now() + wait < gives_up_at
            if decided or not helps or not in_time:
                raise answer
            await self.sleep(wait)
            attempt += 1

    async def _attempt(
        self, request: httpx.Request, expected: int, secs_left: float
    ) -> dict[str, Any] | NotAdmitted:
        """Send the request once. A refusal is a value here, for `ask` to weigh."""
        try:
            async with asyncio.timeout(secs_left):
                answer = await self.client.send(request)
        except (httpx.RequestError, TimeoutError) as error:
            # Repeating is safe: the key keeps the request from being counted twice.
            repeatable = isinstance(error, httpx.TransportError | TimeoutError)
            return _unavailable("no_answer", error, retryable=repeatable)
        try:
            body = answer.json()
            if answer.status_code == expected and isinstance(body["session_id"], str):
                return dict(body)
            known = {"request_id": answer.headers.get("x-request-id", "")}
            known["retry_after_secs"] = answer.headers.get("retry-after")
            return (Unavailable if answer.is_server_error else Denied)(known | body)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            return _unavailable("not_understood", error, retryable=False)


def _unavailable(code: str, cause: BaseException, *, retryable: bool) -> Unavailable:
    problem = {
        "code": code,
        "title": "The call could not be checked, so it was not made.",
        "detail": f"{type(cause).__name__} {cause}",
        "retryable": retryable,
        "next_action": "retry_with_same_key" if retryable else "stop",
    }
    failure = Unavailable(problem)
    failure.__cause__ = cause
    return failure


class Session:
    """An open session of one agent. `Arbiter.session` makes it."""

    def __init__(self, arbiter: Arbiter, session_id: str, agent_id: str) -> None:
        self._arbiter = arbiter
        self._path = f"/sessions/{session_id}"
        self._agent: dict[str, Any] = {"agent_id": agent_id}
        self._closed = False

    @asynccontextmanager
    async def call(
        self, tool_name: str, *, data_sensitivity: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Have one call admitted, then run the body. It yields the session as it is now.

        Also a decorator: `@session.call("read_note")` has every call of an async function
        admitted. Raises `Denied` or `Unavailable`, and then the body does not run.
        """
        call = self._agent | {"tool_name": tool_name}
        if data_sensitivity is not None:
            call["data_sensitivity"] = data_sensitivity
        yield await self._arbiter.ask("POST", f"{self._path}/calls", call)

    async def allowed(self, tool_names: Iterable[str]) -> set[str]:
        """Return those tools that the session may call. Costs nothing, and reserves nothing.

        Only the allow-list counts, not what is left of the budget or the rate limit. Raises
        `Denied` if the session is over, and `Unavailable`.
        """
        names = [name for name in dict.fromkeys(tool_names) if TOOL_NAME.fullmatch(name)]
        allowed: set[str] = set()
        for start in range(0, len(names), MAX_BATCH):
            batch = names[start : start + MAX_BATCH]
            missing = await self._not_allowed(batch)
            allowed.update(name for i, name in enumerate(batch) if i not in missing)
        return allowed

    async def _not_allowed(self, batch: list[str]) -> set[int]:
        """Return the positions of the tools in `batch` that the session may not call."""
        tools = self._agent | {"tool_names": batch}
        try:
            await self._arbiter.ask("POST", f"{self._path}/batch", tools, dry_run=True)
        except Denied as denied:
            if not denied.violations:
                raise
            return {
                index
                for violation in denied.violations
                if violation.get("code") == "tool_not_authorized"
                for index in violation.get("tool_indexes", range(len(batch)))
            }
        return set()

    async def close(self) -> None:
        """Close the session, once. A failure is logged: the session then ends by itself."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._arbiter.ask("DELETE", self._path)
        except NotAdmitted as refused:
            if refused.code not in _NOTHING_TO_CLOSE:
                logging.getLogger(__name__).warning("session not closed: %s", refused)
