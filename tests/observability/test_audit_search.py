"""`arbiter audit`: finding lines in audit files, rotated and compressed ones too."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from app.__main__ import main
from app.domain.admission import already_closed
from app.domain.session import Session
from app.observability import audit_search
from app.observability.audit import Actor, AuditLog
from app.observability.audit_search import AuditSearch, Wanted, parse_time, rotations
from app.observability.metrics import Metrics
from tests.services import ROOT
from tests.support import AGENT, OTHER_AGENT, START, a_grant, new_id

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(minutes: float) -> str:
    return (NOON + timedelta(minutes=minutes)).isoformat(timespec="microseconds")


def a_line(minutes: float = 0, event: str = "call", **fields: Any) -> str:
    return json.dumps({"at": at(minutes), "event": event, "outcome": "admitted"} | fields)


def digest(session_id: str) -> str:
    return sha256(session_id.encode()).hexdigest()


def of_session(session_id: str, minutes: float = 0, **fields: Any) -> str:
    known = {"session": session_id[:8], "session_sha256": digest(session_id)}
    return a_line(minutes, **known, **fields)


def write(file: Path, *lines: str) -> Path:
    text = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder, without a .env."""
    monkeypatch.chdir(tmp_path)


class Searching:
    """Runs the command and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.error = ""
        self.code = -1

    def __call__(self, *arguments: str | Path) -> list[str]:
        try:
            self.code = main(["audit", *map(str, arguments)])
        except SystemExit as error:
            self.code = int(error.code or 0)
        printed = self._capsys.readouterr()
        self.error = printed.err
        return printed.out.splitlines()


@pytest.fixture
def search(capsys: pytest.CaptureFixture[str]) -> Searching:
    return Searching(capsys)


@pytest.mark.anyio
async def test_lines_are_found_as_the_service_writes_them(
    search: Searching, tmp_path: Path
) -> None:
    file = tmp_path / "audit.log"
    session, other, gate = new_id(), new_id(), Actor("gate", "r-1")
    denied = already_closed(Session.opened(session, a_grant(), START))
    log = AuditLog(str(file), Metrics())
    log.open()
    log.note("create", "admitted", gate, session_id=session, session=denied.session)
    log.note("close", "done", gate, session_id=other)
    log.note("close", denied.code.value, gate, session_id=session, session=denied.session)
    log.note_kill(AGENT, [other, session], Actor("ops", "r-2"))
    log.note("replica", "done", Actor("boss", "r-3"), changed={"draining": True}, pid=7)
    await log.aclose()
    created, closed, again, killed, replica = file.read_text().splitlines()

    assert search(file) == [created, closed, again, killed, replica]
    assert search("--session", session, file) == [created, again, killed]
    assert search("--session", session[:8], file) == [created, again]
    assert search("--session", digest(session), file) == [created, again, killed]
    assert search("--agent", AGENT.upper(), file) == [created, again, killed]
    assert search("--outcome", "session_closed", file) == [again]
    assert search("--request-id", "r-2", file) == [killed]
    assert search("--caller", "boss", "--since", "1m", file) == [replica]
    assert (search.code, search.error) == (0, "")


def test_every_filter_must_match(search: Searching, tmp_path: Path) -> None:
    session = new_id()
    wanted = of_session(session, 1, agent_id=AGENT, caller="gate", outcome="rate_limited")
    file = write(
        tmp_path / "a",
        of_session(new_id(), 1, agent_id=AGENT, caller="gate", outcome="rate_limited"),
        of_session(session, 1, agent_id=OTHER_AGENT, caller="gate", outcome="rate_limited"),
        of_session(session, 1, agent_id=AGENT, caller="ops", outcome="rate_limited"),
        of_session(session, 1, agent_id=AGENT, caller="gate"),
        of_session(session, 0, agent_id=AGENT, caller="gate", outcome="rate_limited"),
        wanted,
        of_session(session, 2, agent_id=AGENT, caller="gate", outcome="rate_limited"),
    )

    found = search(
        *("--session", session, "--agent", AGENT, "--caller", "gate"),
        *("--outcome", "rate_limited", "--since", at(1), "--until", at(2), file),
    )

    assert found == [wanted]


def test_since_includes_its_instant_and_until_does_not(
    search: Searching, tmp_path: Path
) -> None:
    lines = [a_line(minutes) for minutes in range(4)]
    file = write(tmp_path / "a", *lines)

    assert search("--since", "2026-01-01T12:01:00Z", file) == lines[1:]
    assert search("--since", "2026-01-01T13:01:00+01:00", file) == lines[1:]
    assert search("--until", "2026-01-01T12:01:00Z", file) == lines[:1]


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("0s", timedelta()),
    ],
)
def test_a_duration_counts_back_from_now(text: str, ago: timedelta) -> None:
    assert parse_time(text, NOON) == NOON - ago


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "15",
        "m",
        "-5m",
        "1.5h",
        "2w",
        "9" * 30 + "d",
        "99999999d",
        "\u0665m",
        "2026-01-01",
        "2026-01-01T12:00:00",
        "12:00",
        "2026-13-01T00:00:00Z",
    ],
)
def test_what_is_neither_an_instant_nor_a_duration_is_a_usage_error(
    search: Searching, tmp_path: Path, text: str
) -> None:
    file = write(tmp_path / "a", a_line())

    assert search(f"--since={text}", file) == []
    assert search.code == 2
    assert "such as 15m" in search.error


@pytest.mark.parametrize(
    "arguments",
    [
        ("--session", "7c9e"),
        ("--session", AGENT.upper()),
        ("--session", ""),
        ("--agent", "7c9e6679"),
        ("--outcome", "denied"),
        ("--outcome", ""),
        ("--when", "now"),
    ],
)
def test_a_filter_that_could_not_match_is_a_usage_error(
    search: Searching, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    assert search(*arguments, write(tmp_path / "a", a_line())) == []
    assert search.code == 2


def test_a_usage_error_does_not_repeat_a_session_id(search: Searching) -> None:
    search("--session", AGENT.upper())

    assert "give a whole session id in lower case" in search.error
    assert AGENT[:8].upper() not in search.error


def test_nothing_found_is_exit_code_1(search: Searching, tmp_path: Path) -> None:
    assert search("--caller", "nobody", write(tmp_path / "a", a_line())) == []
    assert (search.code, search.error) == (1, "")


def test_lines_are_printed_byte_for_byte(tmp_path: Path) -> None:
    odd = (
        b'{ "event":"call",  "at":"2026-01-01T12:00:00Z", "new_field": {"x": "\xc3\xa9"} }\r\n'
    )
    file = tmp_path / "a"
    file.write_bytes(odd)

    assert list(AuditSearch(Wanted()).lines([file])) == [odd]


def test_a_last_line_without_an_end_does_not_run_into_the_next_file(
    search: Searching, tmp_path: Path
) -> None:
    first, second = a_line(0), a_line(1)
    cut = tmp_path / "a"
    cut.write_text(first)

    assert search(cut, write(tmp_path / "b", second)) == [first, second]


def test_damaged_lines_are_skipped_and_counted(search: Searching, tmp_path: Path) -> None:
    good = a_line()
    file = tmp_path / "a"
    damaged = [
        good[:-5].encode(),
        b"\x00\x00\x00",
        b"\xff\xfe",
        b"[]",
        b'{"event":"call"}',
        b'{"at":"yesterday","event":"call"}',
        b'{"at":"2026-01-01T12:00:00","event":"call"}',
        b'{"at":"2026-01-01T12:00:00Z","event":"call","caller":7}',
        b'{"at":"2026-01-01T12:00:00Z","event":"call","x":' + b"[" * 100_000,
        b'{"at":"2026-01-01T12:00:00Z","event":"call","caller":"\xff"}',
    ]
    file.write_bytes(b"\n".join([good.encode(), *damaged, b"", good.encode(), b""]))

    assert search(file) == [good, good]
    assert search.code == 0
    assert search.error == f"arbiter: skipped {len(damaged)} damaged lines\n"

    assert search(write(tmp_path / "b", "x")) == []
    assert (search.code, search.error) == (1, "arbiter: skipped 1 damaged line\n")


def test_a_line_that_is_too_long_is_damaged_and_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_search, "MAX_LINE_BYTES", 1000)
    file = write(tmp_path / "a.gz", a_line(0), "x" * 10_000_000, a_line(1))
    search = AuditSearch(Wanted())
    tracemalloc.start()
    try:
        found = list(search.lines([file]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert (len(found), search.damaged) == (2, 1)
    assert peak < 2_000_000


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    line = f"{a_line()}\n".encode()
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(100):
            out.write(line * 1000)
    search = AuditSearch(Wanted(caller="nobody"))
    tracemalloc.start()
    try:
        assert list(search.lines([file])) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1_000_000


def test_compressed_files_are_read(search: Searching, tmp_path: Path) -> None:
    lines = [a_line(0), a_line(1)]
    old = write(tmp_path / "audit.log-20260101.gz", lines[0])

    assert search(old, write(tmp_path / "audit.log", lines[1])) == lines


def test_files_are_read_in_the_order_in_which_they_are_named(
    search: Searching, tmp_path: Path
) -> None:
    early, late = a_line(0), a_line(1)
    a, b = write(tmp_path / "a", late), write(tmp_path / "b", early)

    assert search(a, b) == [late, early]


@pytest.mark.parametrize(
    "names",
    [
        ["audit.log.10.gz", "audit.log.9.gz", "audit.log.2", "audit.log.1", "audit.log"],
        ["audit.log-20251231.gz", "audit.log-20260101.gz", "audit.log-20260102", "audit.log"],
        ["audit.log.2025-12-31T23:00:00Z.gz", "audit.log-20260101-1767268800", "audit.log"],
        ["audit.log.3.gz", "audit.log-20260101"],
    ],
)
def test_without_files_the_log_and_its_rotations_are_read_oldest_first(
    search: Searching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setenv("ARBITER_AUDIT_LOG", str(tmp_path / "audit.log"))
    lines = [a_line(minutes) for minutes in range(len(names))]
    for name, line in zip(names, lines, strict=True):
        write(tmp_path / name, "damaged", line)
    for stranger in ("audit.log.swp", "audit.logs", "other-audit.log", "audit.log.d", "audit"):
        write(tmp_path / stranger, a_line(9))
    (tmp_path / "audit.log.7").mkdir()

    assert search() == lines
    assert search.code == 0


def test_rotations_without_a_single_sound_line_are_read_too(tmp_path: Path) -> None:
    names = ["audit.log", "audit.log.1", "audit.log.2.gz"]
    write(tmp_path / names[0])
    write(tmp_path / names[1], a_line())
    (tmp_path / names[2]).write_bytes(b"not gzip")

    assert {each.name for each in rotations(tmp_path / "audit.log")} == set(names)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (None, "name the files: ARBITER_AUDIT_LOG is not set"),
        ("stdout", "name the files: ARBITER_AUDIT_LOG is stdout"),
        ("{folder}/audit.log", "there is no audit log {folder}/audit.log"),
        ("audit.log", "ARBITER_AUDIT_LOG: give the absolute path of a file, or stdout"),
    ],
)
def test_no_files_and_no_log_is_a_usage_error(
    search: Searching,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
    reason: str,
) -> None:
    if setting is not None:
        monkeypatch.setenv("ARBITER_AUDIT_LOG", setting.format(folder=tmp_path))

    assert search() == []
    assert (search.code, search.error) == (2, f"arbiter: {reason.format(folder=tmp_path)}\n")


def unreadable(folder: Path) -> Iterator[tuple[Path, str]]:
    yield folder / "missing", "No such file or directory"
    yield folder, "Is a directory"
    whole = gzip.compress("".join(f"{a_line(n)}\n" for n in range(1000)).encode())
    for name, content in {
        "cut.gz": whole[: len(whole) // 2],
        "wrong.gz": whole[:-8] + bytes(8),
        "broken.gz": whole[:200] + bytes(100) + whole[300:],
        "text.gz": b"not gzip",
    }.items():
        (folder / name).write_bytes(content)
        yield folder / name, "its compressed content is damaged"


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_searched(
    search: Searching, tmp_path: Path
) -> None:
    """Exit code 2: an incomplete answer must not look like a whole one."""
    other = write(tmp_path / "other", a_line(5000, caller="me"))
    for file, reason in unreadable(tmp_path):
        assert search("--caller", "me", file, other) == other.read_text().splitlines()
        assert search.code == 2
        assert f"arbiter: cannot read all of {file}: {reason}\n" in search.error


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path: Path) -> None:
    file = write(tmp_path / "a", *[a_line()] * 50_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "audit", str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == f"{a_line()}\n"
    process.stdout.close()

    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
    process.stderr.close()


def test_a_pipe_can_be_searched(tmp_path: Path) -> None:
    """As in `arbiter audit <(zstdcat audit.log.1.zst)`."""
    ran = subprocess.run(
        [sys.executable, "-m", "app", "audit", "--outcome", "done", "/dev/stdin"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=f"{a_line(outcome='done')}\n{a_line()}\n",
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert (ran.stdout, ran.returncode) == (f"{a_line(outcome='done')}\n", 0)
