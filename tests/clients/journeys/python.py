"""The journey with the Python client of openapi-generator."""

import os
import uuid

import arbiter_client as arbiter

AGENT = uuid.UUID(os.environ["AGENT"])


def client(token: str, url: str = os.environ["ARBITER_URL"]) -> arbiter.ApiClient:
    return arbiter.ApiClient(arbiter.Configuration(host=url, access_token=token))


proxy, operator = client(os.environ["PROXY_TOKEN"]), client(os.environ["OPERATOR_TOKEN"])
sessions, admission = arbiter.SessionsApi(proxy), arbiter.AdmissionApi(proxy)
listing, agents = arbiter.SessionsApi(operator), arbiter.AgentsApi(operator)


def denied(ask, status: int) -> arbiter.Problem:
    try:
        ask()
    except arbiter.ApiException as error:
        assert error.status == status, error
        assert isinstance(error.data, arbiter.Problem), error
        return error.data
    raise AssertionError("not denied")


grant = arbiter.CreateSession(
    agent_id=AGENT, declared_intent="journey", authorized_tools=["read_file", "fs.*"]
)
session = sessions.create_session(grant)
assert (session.call_budget, session.time_limit_secs) == (1000, 1800)
print("create")
it = session.session_id
assert sessions.get_session(it).status == "active"
print("read")
assert admission.record_call(it, arbiter.RecordCall(tool_name="read_file")).calls_made == 1
print("call")
call = arbiter.RecordCall(tool_name="fs.list", agent_id=AGENT, data_sensitivity="internal")
first = admission.record_call_with_http_info(it, call, idempotency_key="step-1")
again = admission.record_call_with_http_info(it, call, idempotency_key="step-1")
assert first.data.calls_made == again.data.calls_made == 2
assert "idempotency-replayed" not in first.headers
assert again.headers["idempotency-replayed"] == "true"
print("repeat")
minimal = admission.record_call_with_http_info(it, call, prefer="return=minimal")
assert (minimal.status_code, minimal.data) == (204, None)
print("minimal")
batch = arbiter.RecordBatch(tool_names=["fs.list", "fs.stat"])
assert admission.record_batch(it, batch).calls_made == 5
print("batch")
assert admission.record_call(it, call, dry_run=True).calls_made == 6
assert sessions.get_session(it).calls_made == 5
print("dry run")
problem = denied(lambda: admission.record_call(it, arbiter.RecordCall(tool_name="rm")), 403)
assert (problem.code, problem.retryable) == ("tool_not_authorized", False)
assert problem.next_action == "use_authorized_tool"
assert problem.violations[0].tool_indexes == [0]
print("denied")
slow = sessions.create_session(grant.model_copy(update={"rate_limit_per_minute": 1}))
admission.record_call(slow.session_id, call)
problem = denied(lambda: admission.record_call(slow.session_id, call), 429)
assert (problem.code, problem.retryable) == ("rate_limited", True)
assert 1 <= problem.retry_after_secs <= 60
print("rate limited")
status = arbiter.SessionStatus.ACTIVE
page = listing.list_sessions(agent_id=AGENT, status=status, limit=1)
rest = listing.list_sessions(agent_id=AGENT, status=status, limit=1, cursor=page.next_cursor)
assert {page.items[0].session_id, rest.items[0].session_id} == {it, slow.session_id}
assert rest.next_cursor is None
print("list")
assert agents.get_agent(AGENT).active_sessions == 2
assert agents.close_agent_sessions(AGENT).closed == 2
print("kill switch")
assert denied(lambda: admission.record_call(it, call), 409).code == "session_closed"
assert denied(lambda: sessions.get_session(uuid.uuid4()), 404).code == "session_not_found"
print("gone")
future = client("any", os.environ["FUTURE_URL"])
later = arbiter.SessionsApi(future).get_session(it)
assert (later.status, later.additional_properties["colour"]) == ("dreaming", "blue")
problem = denied(lambda: arbiter.AdmissionApi(future).record_call(it, call), 403)
assert (problem.code, problem.next_action) == ("wrong_moon", "look_up")
assert problem.additional_properties["moon"] == "full"
assert denied(lambda: arbiter.AgentsApi(future).get_agent(AGENT), 451).code == "wrong_moon"
print("future")
