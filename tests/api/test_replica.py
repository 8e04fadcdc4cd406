"""`/replica`: the process that answers, and what can be changed about it while it runs."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import __version__
from app.domain.capacity import StoreLimits
from app.domain.errors import ShuttingDown
from app.http.auth import Scope, new_key
from app.observability.audit import Actor
from app.observability.events import Events
from app.observability.metrics import Metrics
from app.replica import Replica
from app.service import SessionService
from app.store.memory.store import MemoryStore
from tests.conftest import Api, MakeApi
from tests.engines import until
from tests.services import StartService
from tests.support import ManualClock

pytestmark = pytest.mark.anyio

HEALTH = ["/readyz", "/healthz"]


async def change(api: Api, **fields: Any) -> dict[str, Any]:
    answer = await api.client.patch("/replica", json=fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def status(api: Api, path: str) -> int:
    return (await api.client.get(path)).status_code


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    ours = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [each for each in ours if not each["event"].startswith("HTTP Request")]


async def test_a_replica_says_what_it_is(make_api: MakeApi) -> None:
    api = await make_api(store_url="redis://user:secret@localhost:6379/0", log_level="warning")

    replica = (await api.client.get("/replica")).json()

    assert datetime.fromisoformat(replica.pop("started_at")).utcoffset() is not None
    assert replica == {
        "version": __version__,
        "store": "redis://user:***@localhost:6379/0",
        "draining": False,
        "log_level": "warning",
        "pid": os.getpid(),
    }


async def test_a_draining_replica_is_not_ready_and_goes_on_serving(api: Api) -> None:
    assert (await change(api, draining=True))["draining"] is True

    for path in HEALTH:
        answer = await api.client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, "shutting_down")
    assert await status(api, "/livez") == 200
    session_id = (await api.create())["session_id"]
    assert (await api.call(session_id)).status_code == 200
    assert (await api.client.get("/replica")).json()["draining"] is True


async def test_draining_can_be_undone(api: Api) -> None:
    await change(api, draining=True)
    assert (await change(api, draining=False))["draining"] is False

    assert [await status(api, path) for path in HEALTH] == [200, 200]


async def test_a_retired_process_stays_not_ready_whatever_an_operator_says(
    clock: ManualClock,
) -> None:
    """SIGTERM cannot be taken back."""
    events = Events(Metrics(), log_admissions=False)
    service = SessionService(MemoryStore(StoreLimits(), clock), events, 3600)
    replica = Replica(service, events, "memory://", clock.now)
    service.retire()

    after = replica.update(Actor("boss", "r-1"), draining=False)

    assert after.draining
    with pytest.raises(ShuttingDown):
        await service.ready()


async def test_the_log_level_can_be_raised_and_lowered(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    api = await make_api()
    session_id = (await api.create())["session_id"]
    capsys.readouterr()

    assert (await change(api, log_level="debug"))["log_level"] == "debug"
    await api.call(session_id)
    assert "calls admitted" in [each["event"] for each in told(capsys)]

    await change(api, log_level="info")
    await api.call(session_id)
    await api.call(session_id, "rm")
    events = [each["event"] for each in told(capsys)]
    assert "calls admitted" not in events
    assert "calls denied" in events

    assert (await change(api, log_level="error"))["log_level"] == "error"
    await api.create()
    logging.getLogger("some.library").warning("not this")
    assert [each["event"] for each in told(capsys)] == ["replica changed"]
    assert (await api.client.get("/replica")).json()["log_level"] == "error"


async def test_request_data_that_uvicorn_prints_at_debug_stays_out_of_the_log(api: Api) -> None:
    await change(api, log_level="debug")

    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)


@pytest.mark.parametrize(("before", "after"), [("info", "error"), ("error", "info")])
async def test_a_change_leaves_a_line_whichever_way_the_level_goes(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi, before: str, after: str
) -> None:
    boss, token = new_key("boss", Scope.ADMIN)
    api = await make_api(api_keys=(boss,), log_level=before)
    api.client.headers["authorization"] = f"Bearer {token}"
    answer = await api.client.patch(
        "/replica", json={"log_level": after}, headers={"x-request-id": "r-1"}
    )

    (line,) = [each for each in told(capsys) if each["event"] == "replica changed"]

    assert answer.json()["log_level"] == after
    assert (line["caller"], line["request_id"], line["log_level"]) == ("boss", "r-1", after)
    assert line["pid"] == os.getpid()
    assert "draining" not in line


async def test_a_change_is_audited_once(make_api: MakeApi, tmp_path: Path) -> None:
    boss, token = new_key("boss", Scope.ADMIN)
    file = tmp_path / "audit.log"
    api = await make_api(api_keys=(boss,), audit_log=str(file))
    api.client.headers["authorization"] = f"Bearer {token}"
    await change(api)
    await change(api, draining=False, log_level="info")
    await change(api, draining=True, log_level="info")
    await change(api, draining=True)
    await change(api, draining=False, log_level="warning")
    until(lambda: file.read_text().count("\n") == 3)

    written = [json.loads(line) for line in file.read_text().splitlines()]

    changes = [each for each in written if each["event"] == "replica"]
    assert [(each["outcome"], each["caller"], each["pid"]) for each in changes] == [
        ("done", "boss", os.getpid())
    ] * 2
    assert [each["changed"] for each in changes] == [
        {"draining": True},
        {"draining": False, "log_level": "warning"},
    ]


async def test_an_empty_object_changes_nothing(api: Api) -> None:
    before = (await api.client.get("/replica")).json()

    assert await change(api) == before


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[]",
        '"draining"',
        '{"draining": null}',
        '{"log_level": null}',
        '{"draining": "true"}',
        '{"draining": 1}',
        '{"log_level": "DEBUG"}',
        '{"log_level": "critical"}',
        '{"log_level": 10}',
        '{"pid": 1}',
        '{"draining": true, "version": "2"}',
    ],
)
async def test_a_change_that_makes_no_sense_changes_nothing(api: Api, body: str) -> None:
    before = (await api.client.get("/replica")).json()
    answer = await api.client.patch(
        "/replica", content=body, headers={"content-type": "application/json"}
    )

    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert (await api.client.get("/replica")).json() == before


async def test_a_body_of_no_bytes_is_not_json(api: Api) -> None:
    answer = await api.client.patch("/replica", headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_json")


async def test_only_admins_may_change_a_replica(make_api: MakeApi) -> None:
    ops, token = new_key("ops", Scope.OPERATE)
    api = await make_api(api_keys=(ops,))
    api.client.headers["authorization"] = f"Bearer {token}"

    assert await status(api, "/replica") == 200
    answer = await api.client.patch("/replica", json={"draining": True})
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    assert await status(api, "/readyz") == 200


def test_draining_closes_no_connection(start_service: StartService) -> None:
    """Unlike the drain after SIGTERM."""
    service = start_service()
    with httpx.Client(base_url=service.url) as client:
        client.patch("/replica", json={"draining": True})
        answers = [client.get(path) for path in ("/readyz", "/sessions", "/livez")]

        assert [each.status_code for each in answers] == [503, 200, 200]
        assert all(each.headers.get("connection") != "close" for each in answers)
        sockets = {
            each.extensions["network_stream"].get_extra_info("client_addr")[1]
            for each in answers
        }
        assert len(sockets) == 1
        client.patch("/replica", json={"draining": False})
        assert client.get("/readyz").status_code == 200
    assert service.stop() == 0
