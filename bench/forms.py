"""Every form of every request that real clients send, beside a bare ASGI function."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.load import Load, Target
from bench.report import Required, median, ratio
from bench.servers import CALL, SESSION, ours, peer

BARE, NAIVE, PLAIN = "bare ASGI", "naive FastAPI", "plain call"
JSON = "content-type: application/json"
AGENT = str(SESSION["agent_id"])
SEVERAL = {"tool_names": ["read_file", "list_dir", "fs.read", "read_file", "list_dir"]}
IN_ANOTHER_ORDER = {"data_sensitivity": "internal", "agent_id": AGENT, "tool_name": "read_file"}

LEAST = {
    PLAIN: 0.80,
    "fields in another order, agent, tier": 0.72,
    "content type with charset": 0.72,
    "return=minimal": 0.72,
    "dry run": 0.72,
    "a new idempotency key each": 0.62,
    "batch of 5": 0.70,
    "a denial": 0.62,
    "read a session": 0.72,
    "create a session": 0.40,
    "a gateway": 0.65,
}
"""What each form must reach, relative to the bare function."""

TakeTurns = Callable[[dict[str, Target]], dict[str, list[Load]]]


def forms_of(plain: Target, scratch: Path) -> dict[str, Target]:
    """Return the forms, as targets of one server."""

    def elsewhere(name: str, replaced: str) -> Path:
        paths = scratch / f"{name}-{plain.port}.paths"
        paths.write_text(plain.paths.read_text().replace("/calls", replaced))
        return paths

    gateway = scratch / f"gateway-{plain.port}.paths"
    gateway.write_text("/authz/native\n")
    asks = (
        f"x-arbiter-key: {plain.authorization.removeprefix('Bearer ')}",
        f"x-arbiter-session: {plain.paths.read_text().split('/')[2]}",
        "x-arbiter-tool: read_file",
    )
    create = scratch / f"create-{plain.port}.paths"
    create.write_text("/sessions\n")
    return {
        PLAIN: plain,
        "fields in another order, agent, tier": plain._replace(
            body=json.dumps(IN_ANOTHER_ORDER)
        ),
        "content type with charset": plain._replace(headers=f"{JSON}; charset=utf-8"),
        "return=minimal": plain._replace(headers=f"{JSON}\nprefer: return=minimal"),
        "dry run": plain._replace(paths=elsewhere("dry", "/calls?dry_run=true")),
        "a new idempotency key each": plain._replace(keyed=True),
        "batch of 5": plain._replace(
            paths=elsewhere("batch", "/batch"), body=json.dumps(SEVERAL)
        ),
        "a denial": plain._replace(body=CALL.replace("read_file", "rm"), denied=True),
        "read a session": plain._replace(
            paths=elsewhere("read", ""), method="GET", headers="accept: */*", body=""
        ),
        "create a session": plain._replace(paths=create, body=json.dumps(SESSION)),
        "a gateway": plain._replace(
            paths=gateway,
            method="GET",
            headers="\n".join(asks),
            body="",
        ),
    }


def compare_forms(scratch: Path, take_turns: TakeTurns) -> dict[str, list[Load]]:
    """Load the forms and the peers in turn."""
    with ExitStack() as stack:
        # Creations fill the store; a run makes about a million.
        mine = stack.enter_context(ours(scratch, ARBITER_MAX_SESSIONS="100000000"))
        contestants = {
            BARE: stack.enter_context(peer("bare_asgi", scratch)),
            NAIVE: stack.enter_context(peer("naive_fastapi", scratch)),
        }
        return take_turns(contestants | forms_of(mine, scratch))


def table(found: dict[str, list[Load]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| form | calls/s | ÷ bare ASGI | CPU, µs | p99, ms |", "|---|---|---|---|---|"]
    for name, rounds in found.items():
        middle = median(rounds)
        cpu = statistics.median(each.cpu_us for each in rounds)
        relative = ratio(rounds, found[BARE])
        lines.append(
            f"| {name} | {middle.per_sec:,.0f} | {relative:.2f} | {cpu:.1f} "
            f"| {middle.p99_ms:.2f} |"
        )
    return "\n".join(lines)


def required(found: dict[str, list[Load]]) -> list[Required]:
    """Return the targets with the measured values."""
    rows = [
        Required(f"{form} ÷ bare ASGI", ratio(found[form], found[BARE]), least)
        for form, least in LEAST.items()
    ]
    naive = Required(f"{PLAIN} ÷ naive FastAPI", ratio(found[PLAIN], found[NAIVE]), 4.5)
    return [*rows, naive]
