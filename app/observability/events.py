"""Events of sessions, each reported once: to the log, the metrics, the audit log and the memory
of denials."""

from __future__ import annotations

import asyncio
import os

from app.domain.admission import Admission, Admitted, Denied, Operation, Violation
from app.domain.errors import ArbiterError, ShuttingDown, TransientError
from app.domain.lifecycle import Changed
from app.domain.verbs import Swept
from app.observability.audit import NOBODY, Actor, AuditLog
from app.observability.denials import Denials
from app.observability.logs import LogLevel, LogLimit, apply_log_level, get_logger, short
from app.observability.metrics import Metrics

_DRY_RUN = "dry_run"
_OPERATION = {True: Operation.CALL.value, False: Operation.BATCH.value}

_PAST = {"freeze": "frozen", "unfreeze": "unfrozen"}

LINES_PER_SEC = 10
"""Log lines about creations, about closings, and about denials and refusals of one code in a
second. The audit log has all of them."""

MAX_TOOLS_LOGGED = 8


class Events:
    """Lifecycle events and denials are logged at info, admitted calls at debug. With
    `log_admissions` off, an admission only increments a counter: no log record is made."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        log_admissions: bool,
        audit: AuditLog | None = None,
        denials: Denials | None = None,
    ) -> None:
        self._metrics = metrics
        self._audit = audit
        self._log_admissions = log_admissions
        self._denials = Denials() if denials is None else denials
        self._log = get_logger()
        self._limit = LogLimit(LINES_PER_SEC)

    def apply_log_level(self, level: LogLevel) -> None:
        """Log from now on what `level` asks for."""
        apply_log_level(level)
        self._log_admissions = level == "debug"

    def started(self) -> None:
        """Report that the service has started."""
        if self._audit is not None:
            self._audit.note("start", "done", NOBODY)

    def stopped(self) -> None:
        """Report that the service has served its last request."""
        self._log.info("stopped")
        if self._audit is not None:
            self._audit.note("stop", "done", NOBODY)

    def replica_changed(self, changed: dict[str, bool | str], actor: Actor) -> None:
        """Report what an operator has changed about this process."""
        pid = os.getpid()
        if self._audit is not None:
            self._audit.note("replica", "done", actor, changed=changed, pid=pid)
        self._log.info(
            "replica changed",
            request_id=actor.request_id,
            caller=actor.caller,
            pid=pid,
            **changed,
        )

    def created(self, agent_id: str, decision: Admitted | Denied, actor: Actor) -> None:
        """Report the decision on a creation."""
        if isinstance(decision, Denied):
            if self._audit is not None:
                self._audit.note("create", decision.code.value, actor, agent_id=agent_id)
            self._denials.note("create", decision, actor, agent_id=agent_id)
            self._metrics.decisions["create", decision.code.value] += 1
            if self._limit.admits(decision.code.value):
                self._log.info(
                    "session denied",
                    request_id=actor.request_id,
                    caller=actor.caller,
                    agent_id=short(agent_id),
                    reason=decision.code.value,
                    limit=decision.limit,
                    used=decision.used,
                )
            return
        session = decision.session
        outcome = "replayed" if decision.replayed else "admitted"
        self._metrics.decisions["create", outcome] += 1
        if self._audit is not None:
            self._audit.note(
                "create", outcome, actor, session_id=session.session_id, session=session
            )
        if not decision.replayed:
            self._metrics.created += 1
            if self._limit.admits("session created"):
                self._log.info(
                    "session created",
                    request_id=actor.request_id,
                    caller=actor.caller,
                    session_id=short(session.session_id),
                    agent_id=short(agent_id),
                    call_budget=session.grant.call_budget,
                    time_limit_secs=session.grant.time_limit_secs,
                    tools=len(session.grant.authorized_tools.entries),
                )

    def decided(
        self,
        session_id: str,
        admission: Admission,
        decision: Admitted | Denied,
        actor: Actor,
        *,
        dry_run: bool,
    ) -> None:
        """Report the decision on a call or a batch."""
        if self._audit is not None:
            self._audit.note_decision(session_id, admission, decision, actor, dry_run=dry_run)
        # Not `.value`, which is a function call: this runs for every admission.
        requested = _OPERATION[admission.operation is Operation.CALL]
        operation = _DRY_RUN if dry_run else requested
        if isinstance(decision, Denied):
            self._denials.note(
                requested,
                decision,
                actor,
                session_id=session_id,
                agent_id=admission.agent_id or "",
                tools=admission.tool_names,
                dry_run=dry_run,
            )
            code = decision.code.value
            self._metrics.decisions[operation, code] += 1
            if self._limit.admits(code):
                self._log.info(
                    "calls denied",
                    request_id=actor.request_id,
                    caller=actor.caller,
                    session_id=short(session_id),
                    operation=operation,
                    calls=len(admission.tool_names),
                    # Names are of the grammar of tools, so they cannot break a line.
                    tools=admission.tool_names[:MAX_TOOLS_LOGGED],
                    reason=code,
                    violations=list(map(_figures, decision.violations)),
                )
            return
        outcome = "replayed" if decision.replayed else "admitted"
        self._metrics.decisions[operation, outcome] += 1
        if self._log_admissions:
            self._log.debug(
                f"calls {outcome}",
                session_id=short(session_id),
                operation=operation,
                tool_names=admission.tool_names,
                calls_made=decision.session.usage.calls_made,
                call_budget=decision.session.grant.call_budget,
            )

    def failed(
        self,
        event: str,
        error: ArbiterError | asyncio.CancelledError,
        actor: Actor,
        *,
        session_id: str = "",
        agent_id: str = "",
        admission: Admission | None = None,
    ) -> None:
        """Report a request that failed with its outcome unknown. Only transient errors and
        cancellation are audited."""
        if isinstance(error, asyncio.CancelledError):
            error = ShuttingDown()
        if self._audit is not None and isinstance(error, TransientError):
            self._audit.note(
                event,
                error.code,
                actor,
                session_id=session_id,
                agent_id=agent_id,
                admission=admission,
                outcome_unknown=error.outcome_unknown,
            )

    def changed(
        self,
        kind: str,
        session_id: str,
        outcome: Changed | Denied,
        actor: Actor,
        reason: str = "",
    ) -> None:
        """Report a change of a session's terms other than closing: `amend`, `pause` or
        `resume`, which come with a reason."""
        if isinstance(outcome, Denied):
            self._change_denied(kind, session_id, outcome, actor)
            return
        session = outcome.session
        result = "replayed" if outcome.replayed else "done"
        if self._audit is not None:
            self._audit.note(
                kind, result, actor, session_id=session_id, session=session, reason=reason
            )
        if outcome.replayed:
            return
        self._metrics.changes[kind] += 1
        self._log.info(
            "session changed",
            request_id=actor.request_id,
            caller=actor.caller,
            session_id=short(session_id),
            change=kind,
            revision=session.terms.rev,
        )

    def _change_denied(self, kind: str, session_id: str, denied: Denied, actor: Actor) -> None:
        code = denied.code.value
        if self._audit is not None:
            self._audit.note(kind, code, actor, session_id=session_id, session=denied.session)
        self._denials.note(kind, denied, actor, session_id=session_id)
        self._metrics.decisions[kind, code] += 1
        if self._limit.admits(code):
            self._log.info(
                "change denied",
                request_id=actor.request_id,
                caller=actor.caller,
                session_id=short(session_id),
                change=kind,
                reason=code,
            )

    def agent_changed(self, kind: str, agent_id: str, actor: Actor, reason: str) -> None:
        """Report that an agent was frozen or unfrozen."""
        if self._audit is not None:
            self._audit.note(kind, "done", actor, agent_id=agent_id, reason=reason)
        self._metrics.changes[kind] += 1
        self._log.info(
            f"agent {_PAST[kind]}",
            request_id=actor.request_id,
            caller=actor.caller,
            agent_id=short(agent_id),
        )

    def closed(self, session_id: str, outcome: Changed | Denied, actor: Actor) -> None:
        """Report an attempt to close a session."""
        if isinstance(outcome, Denied):
            self._change_denied("close", session_id, outcome, actor)
            return
        session = outcome.session
        if self._audit is not None:
            self._audit.note("close", "done", actor, session_id=session_id, session=session)
        self._metrics.ended["closed"] += 1
        if self._limit.admits("session closed"):
            self._log.info(
                "session closed",
                request_id=actor.request_id,
                caller=actor.caller,
                session_id=short(session.session_id),
                agent_id=short(session.grant.agent_id),
                calls_made=session.usage.calls_made,
            )

    def refused(self, code: str, actor: Actor, client: str) -> None:
        """Report a request that was refused before it reached the service, from the network
        address `client`."""
        self._metrics.refused[code] += 1
        if self._limit.admits(code):
            self._log.info(
                "request refused",
                request_id=actor.request_id,
                caller=actor.caller,
                client=client,
                reason=code,
            )

    def agent_closed(self, agent_id: str, closed: list[str], actor: Actor) -> None:
        """Report a use of the kill switch, which closed the sessions with these ids."""
        if self._audit is not None:
            self._audit.note_kill(agent_id, closed, actor)
        self._metrics.ended["agent_closed"] += len(closed)
        self._log.info(
            "agent closed",
            request_id=actor.request_id,
            caller=actor.caller,
            agent_id=short(agent_id),
            closed=len(closed),
        )

    def swept(self, swept: Swept) -> None:
        """Report one slice of a sweep."""
        self._metrics.ended["expired"] += swept.expired

    def sweep_finished(self, removed: int, duration_secs: float) -> None:
        """Report a whole sweep."""
        self._metrics.sweeps.observe(duration_secs)
        if removed:
            if self._audit is not None:
                self._audit.note("sweep", "done", NOBODY, number=removed)
            self._log.info("sessions swept", removed=removed)

    def sweep_failed(self) -> None:
        """Log the exception that ended a sweep; call this from the `except` clause."""
        self._log.exception("sweep failed")


def _figures(violation: Violation) -> str:
    """A violation in a few characters: `budget_exceeded 3+2>4`."""
    code = violation.code.value
    if violation.limit is not None:
        return f"{code} {violation.used}+{violation.requested}>{violation.limit}"
    if violation.ceiling is not None:
        return f"{code} >{violation.ceiling.value}"
    return f"{code} at {','.join(map(str, violation.tool_indexes[:MAX_TOOLS_LOGGED]))}"
