"""`python -m bench [--quick]`: measure every documented figure in one run.

One server at a time is under load, on one core; the load generator has another. The
contestants take turns in rounds, so that a slow minute of the machine affects all of them.
Ratios are taken within a round, and their median is reported. Each table is printed as soon as
it is complete, so that a run that is cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.durable import compare_stores, row_name, starting
from bench.forms import compare_forms, table
from bench.forms import required as required_of_forms
from bench.load import CONNECTIONS, SERVER_CORE, WRK, Load, Target, pinned, press
from bench.overload import (
    IDLE_CONNECTIONS,
    WAITING_CLIENTS,
    Overload,
    beside_idle,
    overload,
    waiting_clients,
    waiting_row,
)
from bench.report import Required, load_row, median, plot, ratio
from bench.servers import BATCH_SIZE, batches, ours
from bench.shared import CONNECTIONS as SHARED_CONNECTIONS
from bench.shared import LISTED, MEMORY, ONE, Shared, compare_shared

PLOT = Path(__file__).parent / "live_sessions.svg"
WARM_UP_SECS = 1.0
OVERLOAD_SECS = 30.0
AUDITED = "Arbiter, audit log"


def take_turns(
    contestants: dict[str, Target], rounds: int, secs: float, scratch: Path
) -> dict[str, list[Load]]:
    """Run rounds of load, with each contestant once in each round."""
    for target in contestants.values():
        press(target, WARM_UP_SECS, scratch)
    found: dict[str, list[Load]] = {name: [] for name in contestants}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr)
        for name, target in contestants.items():
            found[name].append(press(target, secs, scratch))
    return found


def compare(rounds: int, secs: float, scratch: Path) -> dict[str, list[Load]]:
    """Load the contestants at 32 connections."""
    with ExitStack() as stack:
        fast = stack.enter_context(ours(scratch))
        contestants = {
            "Arbiter": fast,
            AUDITED: stack.enter_context(
                ours(scratch, ARBITER_AUDIT_LOG=str(scratch / "audit.log"))
            ),
            f"Arbiter, batches of {BATCH_SIZE}": batches(fast, scratch),
        }
        return take_turns(contestants, rounds, secs, scratch)


def grow(sizes: list[int], rounds: int, secs: float, scratch: Path) -> dict[int, Load]:
    """Load the service at growing numbers of live sessions, with calls to random ones."""
    with ExitStack() as stack:
        contestants = {
            str(size): stack.enter_context(ours(scratch, sessions=size)) for size in sizes
        }
        found = take_turns(contestants, rounds, secs, scratch)
    return {int(name): median(each) for name, each in found.items()}


def in_process(sessions: int) -> dict[str, float]:
    """Return the figures of `bench.in_process`, run as a separate process."""
    output = subprocess.run(
        [*pinned(SERVER_CORE), sys.executable, "-m", "bench.in_process", str(sessions)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found: dict[str, float] = json.loads(output)
    return found


class Found(NamedTuple):
    """The results of a whole run."""

    turns: dict[str, list[Load]]
    forms: dict[str, list[Load]]
    stores: dict[str, list[Load]]
    shared: Shared
    sizes: dict[int, Load]
    parts: dict[str, float]
    overloaded: Overload
    waiting: dict[int, list[Load]]
    idle: float


def required(found: Found) -> list[Required]:
    """Return the targets with the measured values."""
    turns, forms, stores, shared, sizes, parts, overloaded, waiting, idle = found
    batch = turns[f"Arbiter, batches of {BATCH_SIZE}"]
    few, many = min(sizes), max(sizes)
    least, most = min(WAITING_CLIENTS), max(WAITING_CLIENTS)
    return [
        *required_of_forms(forms),
        Required(
            f"batch of {BATCH_SIZE}: tool decisions/s ÷ single calls/s",
            BATCH_SIZE * ratio(batch, turns["Arbiter"]),
            8,
        ),
        Required(
            f"p99 at {many:,} live sessions ÷ at {few:,}",
            sizes[many].p99_ms / sizes[few].p99_ms,
            1.5,
            at_most=True,
        ),
        Required(
            "one decision at 256 tools ÷ at 3",
            parts["decision_256_us"] / parts["decision_3_us"],
            1.3,
            at_most=True,
        ),
        Required("longest pause under churn, ms", parts["longest_pause_ms"], 10, at_most=True),
        Required("bytes per session", parts["bytes_per_session"], 1024, at_most=True),
        Required(
            f"SQLite, full ÷ memory, at {CONNECTIONS} connections",
            ratio(
                stores[row_name("SQLite, full", CONNECTIONS)],
                stores[row_name("memory", CONNECTIONS)],
            ),
            0.5,
        ),
        Required(
            f"Valkey, one worker ÷ memory, at {SHARED_CONNECTIONS} connections",
            ratio(shared.turns[ONE], shared.turns[MEMORY]),
            0.5,
        ),
        Required(
            f"Valkey, a page of 100 of {LISTED:,} sessions, CPU ms",
            shared.page_ms,
            20,
            at_most=True,
        ),
        Required(
            "p99 of admitted calls at twice the capacity ÷ at capacity",
            overloaded.ratio,
            3,
            at_most=True,
        ),
        Required(
            f"admitted with {most:,} waiting clients ÷ with {least:,}",
            ratio(waiting[most], waiting[least]),
            0.5,
        ),
        Required(
            f"p99 with {IDLE_CONNECTIONS} idle connections ÷ without",
            idle,
            1.3,
            at_most=True,
        ),
    ]


def machine() -> str:
    """Describe the machine and the load generator."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0].partition(":")[2].strip() if names else model
    client = "wrk" if WRK else "the bundled client, which is slower than wrk"
    return (
        f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"{client}, {CONNECTIONS} connections"
    )


def show(*lines: str) -> None:
    """Print a table, at once."""
    print(*lines, "", sep="\n", flush=True)


def contestants_table(name: str, found: dict[str, list[Load]], *more: str) -> list[str]:
    """Return the table of some contestants, the name of whose column is given."""
    head = [f"| {name} | calls/s | spread | p99, ms |", "|---|---|---|---|"]
    return head + [load_row(contestant, each) for contestant, each in found.items()] + [*more]


def main() -> int:
    """Run every benchmark and print the results. Return 0 even if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--quick", action="store_true", help="rougher, in about three minutes")
    quick = parser.parse_args().quick
    rounds, secs = (2, 1.0) if quick else (5, 5.0)
    sizes = [1000, 100_000] if quick else [1000, 10_000, 100_000, 1_000_000]
    show(machine())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def turns_of(contestants: dict[str, Target]) -> dict[str, list[Load]]:
            return take_turns(contestants, rounds, secs, scratch)

        print("contestants", file=sys.stderr)
        turns = compare(rounds, secs, scratch)
        show(*contestants_table("contestant", turns))
        print("forms", file=sys.stderr)
        forms = compare_forms(scratch, turns_of)
        show(table(forms))
        print("stores", file=sys.stderr)
        stores = compare_stores(scratch, turns_of)
        show(*contestants_table("store", stores))
        shared = compare_shared(scratch, turns_of)
        show(
            *contestants_table(
                f"shared, {SHARED_CONNECTIONS} connections",
                shared.turns,
                f"| redis-benchmark, the admission script | {shared.script_per_sec:,.0f} | | |",
                f"| redis-benchmark, SET of the same size | {shared.set_per_sec:,.0f} | | |",
            )
        )
        start = starting(sizes[-1], scratch)
        print("live sessions", file=sys.stderr)
        by_size = grow(sizes, rounds, secs, scratch)
        show(
            "| live sessions | calls/s | p99, ms |\n|---|---|---|",
            *(
                f"| {size:,} | {x.per_sec:,.0f} | {x.p99_ms:.2f} |"
                for size, x in by_size.items()
            ),
        )
        print("overload", file=sys.stderr)
        overloaded = overload(scratch, 2.0 if quick else OVERLOAD_SECS)
        show(
            "| offered | calls/s | admitted | p99, ms | refused | p99, ms |",
            "|---|---|---|---|---|---|",
            overloaded.capacity.row("capacity"),
            overloaded.twice.row("twice the capacity"),
        )
        waiting = waiting_clients(scratch, rounds, secs)
        show(
            "| waiting clients | admitted/s | refused/s | p99, ms |\n|---|---|---|---|",
            *(waiting_row(clients, loads) for clients, loads in waiting.items()),
        )
        idle = beside_idle(scratch, rounds, secs)
    print("in process", file=sys.stderr)
    parts = in_process(sizes[-1])
    show(
        "| in process | |\n|---|---|",
        *(f"| {part.replace('_', ' ')} | {x:,.3g} |" for part, x in (parts | start).items()),
    )
    measured = Found(turns, forms, stores, shared, by_size, parts, overloaded, waiting, idle)
    show(
        "| figure | found | target | |\n|---|---|---|---|",
        *(figure.row() for figure in required(measured)),
    )
    if not quick:
        plot(by_size, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
