"""The two admission endpoints as a good engineer would write them in an afternoon: pydantic
models, a lock, a dict. No keys, no metrics, no request ids, no rate headers."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

app = FastAPI()
lock = asyncio.Lock()


class NewSession(BaseModel):
    agent_id: uuid.UUID
    declared_intent: str = Field(min_length=1)
    authorized_tools: list[str]
    time_limit_secs: int = 3600
    call_budget: int = 1000
    rate_limit_per_minute: int | None = None
    rate_limit_window_secs: int = 60


class Session(NewSession):
    session_id: uuid.UUID
    created_at: datetime
    expires_at: datetime
    calls_made: int = 0
    rate_window_start: datetime
    rate_window_calls: int = 0
    status: str = "active"


class Call(BaseModel):
    tool_name: str


class Batch(BaseModel):
    tool_names: list[str]


sessions: dict[uuid.UUID, Session] = {}


@app.post("/sessions", status_code=201)
async def create(body: NewSession) -> Session:
    now = datetime.now(UTC)
    session = Session(
        **body.model_dump(),
        session_id=uuid.uuid4(),
        created_at=now,
        expires_at=now + timedelta(seconds=body.time_limit_secs),
        rate_window_start=now,
    )
    async with lock:
        sessions[session.session_id] = session
    return session


async def admit(session_id: uuid.UUID, tools: list[str]) -> Session:
    async with lock:
        session = sessions.get(session_id)
        if session is None:
            raise HTTPException(404, "session not found")
        now = datetime.now(UTC)
        if now >= session.expires_at:
            raise HTTPException(408, "session expired")
        if session.calls_made + len(tools) > session.call_budget:
            raise HTTPException(429, "budget exceeded")
        for tool in tools:
            if tool not in session.authorized_tools:
                raise HTTPException(403, "tool not authorized")
        if session.rate_limit_per_minute is not None:
            window = timedelta(seconds=session.rate_limit_window_secs)
            if now - session.rate_window_start >= window:
                session.rate_window_start, session.rate_window_calls = now, 0
            if session.rate_window_calls + len(tools) > session.rate_limit_per_minute:
                raise HTTPException(429, "rate limited")
        session.rate_window_calls += len(tools)
        session.calls_made += len(tools)
        return session


@app.post("/sessions/{session_id}/calls")
async def record_call(session_id: uuid.UUID, body: Call) -> Session:
    return await admit(session_id, [body.tool_name])


@app.post("/sessions/{session_id}/batch")
async def record_batch(session_id: uuid.UUID, body: Batch) -> Session:
    return await admit(session_id, body.tool_names)
