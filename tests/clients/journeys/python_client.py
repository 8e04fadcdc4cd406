"""The journey with the client of openapi-python-client."""

import os
import uuid

from arbiter_client import AuthenticatedClient, models
from arbiter_client.api.admission import record_batch, record_call
from arbiter_client.api.agents import close_agent_sessions, get_agent
from arbiter_client.api.sessions import create_session, get_session, list_sessions
from arbiter_client.types import UNSET

AGENT = uuid.UUID(os.environ["AGENT"])
URL = os.environ["ARBITER_URL"]
proxy = AuthenticatedClient(base_url=URL, token=os.environ["PROXY_TOKEN"])
operator = AuthenticatedClient(base_url=URL, token=os.environ["OPERATOR_TOKEN"])


def admitted(answer) -> models.Session:
    assert isinstance(answer, models.Session), answer
    return answer


def denied(answer, status: int) -> models.Problem:
    assert answer.status_code == status, answer
    assert isinstance(answer.parsed, models.Problem), answer
    return answer.parsed


grant = models.CreateSession(
    agent_id=AGENT, declared_intent="journey", authorized_tools=["read_file", "fs.*"]
)
session = admitted(create_session.sync(client=proxy, body=grant))
assert (session.call_budget, session.time_limit_secs) == (1000, 1800)
print("create")
it = session.session_id
assert admitted(get_session.sync(it, client=proxy)).status == "active"
print("read")
plain = models.RecordCall(tool_name="read_file")
assert admitted(record_call.sync(it, client=proxy, body=plain)).calls_made == 1
print("call")
call = models.RecordCall(
    tool_name="fs.list", agent_id=AGENT, data_sensitivity=models.DataSensitivity.INTERNAL
)
keyed = {"client": proxy, "body": call, "idempotency_key": "step-1"}
first, again = record_call.sync_detailed(it, **keyed), record_call.sync_detailed(it, **keyed)
assert admitted(first.parsed).calls_made == admitted(again.parsed).calls_made == 2
assert "idempotency-replayed" not in first.headers
assert again.headers["idempotency-replayed"] == "true"
print("repeat")
prefer = models.RecordCallPrefer.RETURNMINIMAL
minimal = record_call.sync_detailed(it, client=proxy, body=call, prefer=prefer)
assert (minimal.status_code, minimal.parsed) == (204, None)
print("minimal")
batch = models.RecordBatch(tool_names=["fs.list", "fs.stat"])
assert admitted(record_batch.sync(it, client=proxy, body=batch)).calls_made == 5
print("batch")
assert admitted(record_call.sync(it, client=proxy, body=call, dry_run=True)).calls_made == 6
assert admitted(get_session.sync(it, client=proxy)).calls_made == 5
print("dry run")
wrong = models.RecordCall(tool_name="rm")
problem = denied(record_call.sync_detailed(it, client=proxy, body=wrong), 403)
assert (problem.code, problem.retryable) == ("tool_not_authorized", False)
assert problem.next_action == "use_authorized_tool"
assert problem.violations[0].tool_indexes == [0]
print("denied")
grant.rate_limit_per_minute = 1
slow = admitted(create_session.sync(client=proxy, body=grant)).session_id
record_call.sync(slow, client=proxy, body=call)
problem = denied(record_call.sync_detailed(slow, client=proxy, body=call), 429)
assert (problem.code, problem.retryable) == ("rate_limited", True)
assert 1 <= problem.retry_after_secs <= 60
print("rate limited")
wanted = {"agent_id": AGENT, "status": models.SessionStatus.ACTIVE, "limit": 1}
page = list_sessions.sync(client=operator, **wanted)
rest = list_sessions.sync(client=operator, cursor=page.next_cursor, **wanted)
assert {page.items[0].session_id, rest.items[0].session_id} == {it, slow}
assert rest.next_cursor is UNSET
print("list")
assert get_agent.sync(AGENT, client=operator).active_sessions == 2
assert close_agent_sessions.sync(AGENT, client=operator).closed == 2
print("kill switch")
closed = denied(record_call.sync_detailed(it, client=proxy, body=call), 409)
assert closed.code == "session_closed"
unknown = denied(get_session.sync_detailed(uuid.uuid4(), client=proxy), 404)
assert unknown.code == "session_not_found"
print("gone")
future = AuthenticatedClient(base_url=os.environ["FUTURE_URL"], token="any")
later = admitted(get_session.sync(it, client=future))
assert (later.status, later.additional_properties["colour"]) == ("dreaming", "blue")
problem = denied(record_call.sync_detailed(it, client=future, body=call), 403)
assert (problem.code, problem.next_action) == ("wrong_moon", "look_up")
assert problem.additional_properties["moon"] == "full"
problem = denied(get_agent.sync_detailed(AGENT, client=future), 451)
assert problem.code == "wrong_moon"
print("future")
