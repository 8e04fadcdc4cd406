"""Encodes sessions and decisions as responses: JSON bodies and rate headers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic_core import to_json

from app.api.problem_types import AGENT_MESSAGES, DENIALS
from app.domain.admission import Admitted, Denied, Violation
from app.domain.advice import DenialCode, NextAction
from app.domain.lifecycle import Changed
from app.domain.session import MICROSECONDS, AgentState, Grant, Session, SessionStatus, Terms
from app.domain.tools import AllowList
from app.http.auth import Caller, Scope
from app.http.problems import problem_response
from app.http.request import StrictRequest
from app.http.response import Headers, RawResponse, json_response
from app.observability.denials import Denial
from app.observability.logs import short
from app.replica import ReplicaState
from app.store.contract import Page

REPLAYED = (b"idempotency-replayed", b"true")
MINIMAL = (b"preference-applied", b"return=minimal")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=8192)
def instant(microseconds: int) -> bytes:
    """Format microseconds since 1970 as RFC 3339, section 5.6, in UTC with six decimals."""
    secs, rest = divmod(microseconds, MICROSECONDS)
    return b"%b.%06dZ" % (_second(secs), rest)


@lru_cache(maxsize=8192)
def _second(secs: int) -> bytes:
    # Cached because many sessions begin, end or open a window in the same second.
    moment = _EPOCH + timedelta(seconds=secs)
    return moment.isoformat(timespec="seconds")[:-6].encode()


class _EncodedTerms(NamedTuple):
    """The parts of a response that only a change of the terms changes."""

    rev: int
    body: bytes
    """The start of its JSON, without the closing brace."""
    policy: tuple[bytes, bytes]
    """Its `RateLimit-Policy` header."""


TERMS_KEPT = 16_384
"""Sessions whose encoded terms are cached, about 600 bytes each."""

_encoded_terms: OrderedDict[str, _EncodedTerms] = OrderedDict()


def _terms(session: Session) -> _EncodedTerms:
    """Return the encoded terms, from the cache if it has this revision."""
    rev = session.terms.rev
    known = _encoded_terms.get(session.session_id)
    if known is None or known.rev != rev:
        known = _EncodedTerms(rev, _encode_terms(session), _policy(session.grant))
        _encoded_terms[session.session_id] = known
        if len(_encoded_terms) > TERMS_KEPT:
            _encoded_terms.popitem(last=False)
    return known


def _encode_terms(session: Session) -> bytes:
    # Formatted by hand for speed: with very many sessions most responses miss the cache. The
    # library encodes free text. Ids and tiers need no escaping.
    grant = session.grant
    rate = grant.rate_limit_per_minute
    return (
        b'{"session_id":"%b","agent_id":"%b","declared_intent":%b,'
        b'"delegation_chain_snapshot":%b,"authorized_tools":%b,"time_limit_secs":%d,'
        b'"call_budget":%d,%b"rate_limit_window_secs":%d,"data_sensitivity_ceiling":"%b",'
        b'"created_at":"%b","expires_at":"%b","revision":%d'
    ) % (
        session.session_id.encode(),
        grant.agent_id.encode(),
        to_json(grant.declared_intent),
        to_json(grant.delegation_chain_snapshot),
        _encode_tools(grant.authorized_tools),
        grant.time_limit_secs,
        grant.call_budget,
        b"" if rate is None else b'"rate_limit_per_minute":%d,' % rate,
        grant.rate_limit_window_secs,
        grant.data_sensitivity_ceiling.encode(),
        instant(session.terms.created_at),
        instant(session.terms.expires_at),
        session.terms.rev,
    )


@lru_cache(maxsize=1024)
def _encode_tools(tools: AllowList) -> bytes:
    return to_json(tools.entries)


def _policy(grant: Grant) -> tuple[bytes, bytes]:
    policy = b'"budget";q=%d' % grant.call_budget
    limit = grant.rate_limit_per_minute
    if limit is not None:
        policy += b', "window";q=%d;w=%d' % (limit, grant.rate_limit_window_secs)
    return (b"ratelimit-policy", policy)


def encode_session(session: Session) -> bytes:
    """Encode a session as JSON. The fields that change during its life come last."""
    return _encode_session(session, _terms(session))


def _encode_session(session: Session, encoded: _EncodedTerms) -> bytes:
    remaining = session.calls_remaining
    terms, usage = session.terms, session.usage
    if terms.closed_at is None and session.as_of < terms.expires_at and terms.paused_at is None:
        state = _ACTIVE if remaining > 0 else _SPENT
    else:
        state = b'"%b","is_active":false}' % session.status.encode()
    return (
        b'%b,"calls_made":%d,"calls_remaining":%d,"rate_window_start":"%b",'
        b'"rate_window_calls":%d,"status":%b'
    ) % (
        encoded.body,
        usage.calls_made,
        remaining,
        instant(usage.rate_window_start),
        usage.rate_window_calls,
        state,
    )


_ACTIVE = b'"active","is_active":true}'
_SPENT = b'"active","is_active":false}'


def rate_headers(session: Session) -> Headers:
    """Return `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10).

    The budget never refills, so it has neither a window nor a reset. An elapsed window counts
    as empty and has no reset either.
    """
    return _rate_headers(session, _terms(session))


def _rate_headers(session: Session, encoded: _EncodedTerms) -> Headers:
    limit = session.grant.rate_limit_per_minute
    remaining = session.calls_remaining
    if limit is None:
        state = b'"budget";r=%d' % remaining
    elif (left_open := session.window_ends_at - session.as_of) > 0:
        state = b'"budget";r=%d, "window";r=%d;t=%d' % (
            remaining,
            limit - session.usage.rate_window_calls,
            -(-left_open // MICROSECONDS),
        )
    else:
        state = b'"budget";r=%d, "window";r=%d' % (remaining, limit)
    return [encoded.policy, (b"ratelimit", state)]


def admitted_response(admitted: Admitted, *, minimal: bool) -> RawResponse:
    """Return the response to admitted calls: the session, or no body if `minimal` (RFC 7240,
    section 4.2)."""
    session = admitted.session
    encoded = _terms(session)
    headers = _rate_headers(session, encoded)
    if admitted.replayed:
        headers.append(REPLAYED)
    if minimal:
        return RawResponse(204, [*headers, MINIMAL])
    return json_response(200, _encode_session(session, encoded), headers)


def denied_response(
    denied: Denied, request: StrictRequest, agent_id: str | None = None
) -> RawResponse:
    """Return the problem response to a denial. A creation names the agent."""
    kind, session = DENIALS[denied.code], denied.session
    members: dict[str, Any] = {
        "retryable": denied.retry_after_secs is not None,
        "next_action": denied.next_action.value,
        "violations": [_violation(each) for each in denied.violations],
    }
    headers: Headers = []
    detail = None
    if session is not None:
        agent_id = session.grant.agent_id
        members["session_ref"] = short(session.session_id)
        detail = _session_detail(denied, session, request.caller, members)
        if denied.code in _REPORTED_BY_RATE_HEADERS:
            headers += rate_headers(session)
    if agent_id is not None:
        members["agent_id"] = agent_id
    if denied.since is not None:
        detail = _since_detail(denied.code, instant(denied.since).decode(), members)
    if denied.retry_after_secs is not None:
        members["retry_after_secs"] = denied.retry_after_secs
        headers.append((b"retry-after", b"%d" % denied.retry_after_secs))
    if denied.limit is not None:
        members |= {
            "limit": denied.limit,
            "used": denied.used,
            "requested": denied.requested,
        }
        if denied.code is DenialCode.TOO_MANY_SESSIONS:
            detail = (
                f"The agent has {denied.used} active sessions of {denied.limit} allowed. The "
                "same request can pass once one of them is closed or has expired."
            )
    return problem_response(kind, request, detail, members, headers)


def _session_detail(
    denied: Denied, session: Session, caller: Caller, members: dict[str, Any]
) -> str | None:
    """What is wrong with the session or about the calls. Adds to `members`."""
    terms = session.terms
    if denied.violations:
        members["agent_message"] = AGENT_MESSAGES[denied.next_action]
        return _sentences(denied, session)
    if denied.code is DenialCode.SESSION_CLOSED:
        return _closing(terms, caller, members)
    if denied.code is DenialCode.SESSION_PAUSED:
        members["since"] = instant(terms.paused_at or 0).decode()
    elif denied.code is DenialCode.REVISION_CONFLICT:
        members["revision"] = terms.rev
        return f"The session has revision {terms.rev} now."
    elif denied.code is DenialCode.SESSION_EXPIRED:
        members["expires_at"] = expires_at = instant(terms.expires_at).decode()
        return f"The session's time limit passed at {expires_at}."
    return None


def _since_detail(code: DenialCode, since: str, members: dict[str, Any]) -> str | None:
    if code is DenialCode.IDEMPOTENCY_CONFLICT:
        return f"This idempotency key was first used at {since}, for another request."
    members["since"] = since
    return None


_REPORTED_BY_RATE_HEADERS = (DenialCode.BUDGET_EXCEEDED, DenialCode.RATE_LIMITED)


def _closing(terms: Terms, caller: Caller, members: dict[str, Any]) -> str:
    """Add who closed a session to `members`, the name only for operators. Return the detail."""
    closed_at = instant(terms.closed_at or 0).decode()
    members["closed_at"] = closed_at
    by = terms.closed_by
    if by is None:
        return f"The session was closed at {closed_at}."
    members["closed_by"] = "kill_switch" if by.kill_switch else "close"
    if by.actor and caller.may((Scope.OPERATE,)):
        members["closed_by_key"] = by.actor
    how = "with all sessions of its agent" if by.kill_switch else "by a request to close it"
    return f"The session was closed at {closed_at} {how}."


def _sentences(denied: Denied, session: Session) -> str:
    """What the violations are about, with their figures."""
    found = [_sentence(each, session.grant) for each in denied.violations]
    if denied.next_action is NextAction.ASK_OPERATOR:
        found.append("A new session on the same terms would refuse it too.")
    return " ".join(found)


def _sentence(violation: Violation, grant: Grant) -> str:
    limit, used = violation.limit, violation.used
    if limit is not None and used is not None:
        left = max(0, limit - used)
        figures = f"{left} of {limit} calls left, {violation.requested} requested."
        if violation.code is DenialCode.BUDGET_EXCEEDED:
            return f"Call budget: {figures}"
        if violation.requested is not None and violation.requested > limit:
            figures += f" No window can hold that many: send at most {limit} at a time."
        return f"Rate window of {grant.rate_limit_window_secs} s: {figures}"
    if violation.ceiling is not None:
        asked = "" if violation.tier is None else f", {violation.tier.value} requested"
        return f"Sensitivity: at most {violation.ceiling.value} data allowed{asked}."
    if violation.requested == 1:
        return "The tool is not on the allow-list."
    *most, last = map(str, violation.tool_indexes)
    if not most:
        return f"The tool at position {last} (counting from 0) is not on the allow-list."
    positions = f"{', '.join(most)} and {last}"
    return f"The tools at positions {positions} (counting from 0) are not on the allow-list."


def _violation(violation: Violation) -> dict[str, Any]:
    entry: dict[str, Any] = {"code": violation.code.value}
    if violation.limit is not None:
        entry |= {
            "limit": violation.limit,
            "used": violation.used,
            "requested": violation.requested,
        }
    if violation.ceiling is not None:
        entry["ceiling"] = violation.ceiling.value
    if violation.tool_indexes:
        entry["tool_indexes"] = violation.tool_indexes
    return entry


def created_response(admitted: Admitted, request: StrictRequest) -> RawResponse:
    """Return the response to a creation."""
    location = f"{request.root_path}/sessions/{admitted.session.session_id}"
    headers = [(b"location", location.encode())]
    if admitted.replayed:
        headers.append(REPLAYED)
    return json_response(201, encode_session(admitted.session), headers)


def session_response(session: Session, caller: Caller) -> RawResponse:
    """Return the response with a session. Operators see who paused it."""
    body, terms = encode_session(session), session.terms
    if session.status is SessionStatus.PAUSED and caller.may((Scope.OPERATE,)):
        paused: dict[str, Any] = {"at": instant(terms.paused_at or 0).decode()}
        by = terms.paused_by
        if by is not None and by.actor:
            paused["by"] = by.actor
        if by is not None and by.reason:
            paused["reason"] = by.reason
        body = b'%b,"paused":%b}' % (body[:-1], to_json(paused))
    return json_response(200, body, [])


def _agent(agent_id: str, state: AgentState) -> dict[str, Any]:
    body: dict[str, Any] = {
        "agent_id": agent_id,
        "active_sessions": state.active_sessions,
        "paused_sessions": state.paused_sessions,
        "frozen": state.freeze is not None,
    }
    if state.freeze is not None:
        body["frozen_at"] = instant(state.freeze.frozen_at).decode()
        if state.freeze.by:
            body["frozen_by"] = state.freeze.by
        if state.freeze.reason:
            body["reason"] = state.freeze.reason
    return body


def agent_response(agent_id: str, state: AgentState) -> RawResponse:
    """Return the response with an agent."""
    return json_response(200, to_json(_agent(agent_id, state)), [])


def agents_response(
    states: Iterable[tuple[str, AgentState]], next_cursor: str | None
) -> RawResponse:
    """Return the response with a page of agents."""
    body: dict[str, Any] = {"items": [_agent(*each) for each in states]}
    if next_cursor is not None:
        body["next_cursor"] = next_cursor
    return json_response(200, to_json(body), [])


def changed_response(outcome: Changed | Denied, request: StrictRequest) -> RawResponse:
    """Return the response to a change: the session after it, or a problem."""
    if isinstance(outcome, Denied):
        return denied_response(outcome, request)
    response = session_response(outcome.session, request.caller)
    if outcome.replayed:
        response.headers.append(REPLAYED)
    return response


def page_response(page: Page) -> RawResponse:
    """Return the response with a page of sessions."""
    items = b",".join(map(encode_session, page.sessions))
    cursor = b"" if page.next_cursor is None else b',"next_cursor":' + to_json(page.next_cursor)
    return json_response(200, b'{"items":[%b]%b}' % (items, cursor), [])


def denials_response(denials: Iterable[Denial]) -> RawResponse:
    """Return the response with a list of denials."""
    return json_response(200, to_json({"items": list(map(_denial, denials))}), [])


def _denial(denial: Denial) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "at": instant(denial.at).decode(),
        "operation": denial.operation,
        "code": denial.code.value,
    }
    if denial.session_id:
        entry["session_id"] = denial.session_id
    if denial.agent_id:
        entry["agent_id"] = denial.agent_id
    return entry | {
        "caller": denial.actor.caller,
        "request_id": denial.actor.request_id,
        "tools": denial.tools,
        "dry_run": denial.dry_run,
        "violations": list(map(_violation, denial.violations)),
    }


def replica_response(state: ReplicaState) -> RawResponse:
    """Return the response with the state of this process."""
    started_at = instant(state.started_at).decode()
    return json_response(200, to_json(state._asdict() | {"started_at": started_at}), [])
