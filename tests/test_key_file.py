"""The file with API keys: its form, its mistakes, and its changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain.ceilings import Ceilings
from app.domain.session import DataSensitivity
from app.domain.tools import AllowList
from app.http.auth import ApiKey, Authenticator, Scope, Unauthenticated, new_key
from app.key_file import MAX_BYTES, POLL_EVERY_SECS, BadKeyFile, KeyFile, read_keys

A, B, C = (digit * 64 for digit in "abc")
OLD, OLD_TOKEN = new_key("gate", Scope.PROXY)
NEW, NEW_TOKEN = new_key("gate", Scope.PROXY)
OPS, OPS_TOKEN = new_key("ops", Scope.OPERATE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (f"gate:proxy:{A}", [ApiKey("gate", Scope.PROXY, A)]),
        (f"# a comment\n\n  \n  gate:proxy:{A}  \r\n", [ApiKey("gate", Scope.PROXY, A)]),
        (
            f"gate:proxy:{A}\nops:operate:{A}\ngate:proxy:{B}\n",
            [
                ApiKey("gate", Scope.PROXY, A),
                ApiKey("gate", Scope.PROXY, B),
                ApiKey("ops", Scope.OPERATE, A),
            ],
        ),
        (
            f"gate:proxy:{A} max_call_budget=0",
            [ApiKey("gate", Scope.PROXY, A, Ceilings(call_budget=0))],
        ),
        (
            f"gate:proxy:{A}\tmax_tier=public  tools=fs.*,read_*  max_time_limit_secs=60",
            [
                ApiKey(
                    "gate",
                    Scope.PROXY,
                    A,
                    Ceilings(
                        None, 60, AllowList.of(["fs.*", "read_*"]), DataSensitivity.PUBLIC
                    ),
                )
            ],
        ),
        (
            f"g:proxy:{A} max_tier=public\ng:proxy:{B} max_tier=public",
            [
                ApiKey(
                    "g", Scope.PROXY, each, Ceilings(None, None, None, DataSensitivity.PUBLIC)
                )
                for each in (A, B)
            ],
        ),
    ],
)
def test_a_line_is_a_key_and_the_most_that_it_may_grant(
    file: Path, text: str, keys: list[ApiKey]
) -> None:
    file.write_text(text)

    assert list(read_keys(file, ())) == keys


def test_the_keys_of_the_file_stand_beside_the_others(file: Path) -> None:
    file.write_text(f"{NEW}\n")

    assert {*read_keys(file, (OLD, OPS))} == {OLD, NEW, OPS}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("gate", "must be written"),
        (f"gate:boss:{C}", "scope must be"),
        (f"gate:proxy:{C}0", "must end in"),
        (f"gate:proxy:{C},ops:operate:{C}", "must be written"),
        (f"gate:proxy:{C} secret-word", "must be one of"),
        (f"gate:proxy:{C} max_budget=1", "must be one of"),
        (f"gate:proxy:{C} # secret-word", "must be one of"),
        (f"gate:proxy:{C} max_call_budget", "must be a whole number"),
        (f"gate:proxy:{C} max_call_budget=", "must be a whole number"),
        (f"gate:proxy:{C} max_call_budget=-1", "must be a whole number"),
        (f"gate:proxy:{C} max_call_budget=1.5", "must be a whole number"),
        (f"gate:proxy:{C} max_call_budget=2147483648", "must be a whole number"),
        (f"gate:proxy:{C} max_time_limit_secs=1h", "must be a whole number"),
        (f"gate:proxy:{C} max_tier=secret-word", "must be one of public"),
        (f"gate:proxy:{C} max_tier=Public", "must be one of public"),
        (f"gate:proxy:{C} tools=", "must be 1 to 256 tool names"),
        (f"gate:proxy:{C} tools=a,,b", "must be 1 to 256 tool names"),
        (f"gate:proxy:{C} tools=secret-word!", "must be 1 to 256 tool names"),
        (f"gate:proxy:{C} tools={','.join(['a'] * 257)}", "must be 1 to 256 tool names"),
        (f"gate:proxy:{C} max_tier=public max_tier=public", "max_tier is there twice"),
        (f"ops:proxy:{A}", "there twice"),
        (f"ops:operate:{C}", "same scope"),
        (f"ops:proxy:{C} max_tier=public", "same limits"),
        (f"ops:proxy:{B}\nops:proxy:{C}", "three API keys"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_not_repeated(
    file: Path, line: str, says: str
) -> None:
    file.write_text(f"# keys\nops:proxy:{A}\n{line}\n")

    with pytest.raises(BadKeyFile, match=says) as refusal:
        read_keys(file, ())

    number = 2 + len(line.splitlines())
    assert f"{file}, line {number}: " in str(refusal.value)
    for secret in (A, B, C, "secret-word"):
        assert secret not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: None, "No such file"),
        (lambda file: file.mkdir(), "Is a directory"),
        (os.mkfifo, "is not a regular file"),
        (lambda file: file.write_bytes(b"#" * (MAX_BYTES + 1)), "is larger than"),
        (lambda file: file.write_bytes(b"\xff"), "not UTF-8"),
        (lambda file: file.write_bytes(b""), "has no API keys"),
        (lambda file: file.write_bytes(b"# nothing\n"), "has no API keys"),
    ],
    ids=["absent", "a folder", "a FIFO", "too large", "not text", "empty", "comments only"],
)
def test_a_file_that_gives_no_keys_is_refused(
    file: Path, make: Callable[[Path], object], says: str
) -> None:
    make(file)

    with pytest.raises(BadKeyFile, match=says):
        read_keys(file, ())


class Watched:
    """A file that is watched, and polled whenever the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text(f"{OLD}\n")
        self._file = KeyFile(path, (OPS,), self._sleep)
        self._authenticator = Authenticator(
            read_keys(path, (OPS,)), allow_unauthenticated=False
        )
        self._polls = 0

    async def _sleep(self, secs: float) -> None:
        assert secs == POLL_EVERY_SECS
        if not self._polls:
            raise asyncio.CancelledError
        self._polls -= 1

    def poll(self, times: int = 2) -> None:
        # The last poll is followed by the sleep that ends the task.
        self._polls = times
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(self._file.run(self._authenticator))

    def reload(self) -> None:
        asyncio.run(self._file.reload(self._authenticator))

    def replace(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.path)

    def accepts(self, token: str) -> bool:
        try:
            self._authenticator.identify(b"Bearer " + token.encode(), None)
        except Unauthenticated:
            return False
        return True


@pytest.fixture
def watched(file: Path) -> Watched:
    return Watched(file)


def test_a_change_is_noticed_within_5_seconds() -> None:
    # It can happen just after a poll, and is read at the second one that sees it.
    assert 2 * POLL_EVERY_SECS < 5


def test_a_changed_file_replaces_its_keys_and_no_others(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.replace(f"{NEW}\n")

    watched.poll()

    assert watched.accepts(NEW_TOKEN)
    assert not watched.accepts(OLD_TOKEN)
    assert watched.accepts(OPS_TOKEN)
    said = capsys.readouterr().out
    assert NEW.digest not in said


def test_a_file_that_is_still_being_written_is_left_alone(watched: Watched) -> None:
    for written in ("# new\n", f"# new\n{NEW}", f"# new\n{NEW}\n"):
        watched.path.write_text(written)
        watched.poll(1)
        assert watched.accepts(OLD_TOKEN)

    watched.poll(1)

    assert watched.accepts(NEW_TOKEN)


def test_a_reload_does_not_wait(watched: Watched) -> None:
    watched.replace(f"{NEW}\n")

    watched.reload()

    assert watched.accepts(NEW_TOKEN)


def test_an_unchanged_file_is_not_read_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.key_file.read_keys", lambda *_: pytest.fail("read again"))

    watched.poll(5)


FAULTY = [f"{NEW}\ngate:proxy\n", "\xff", f"{NEW}\n{NEW}\n"]


@pytest.mark.parametrize("text", FAULTY, ids=["half a line", "no key", "twice"])
def test_a_faulty_file_changes_nothing_and_is_logged_once(
    watched: Watched, text: str, errors: list[str]
) -> None:
    watched.replace(text)
    watched.poll(5)

    assert watched.accepts(OLD_TOKEN)
    assert not watched.accepts(NEW_TOKEN)
    assert len(errors) == 1
    assert NEW.digest not in errors[0]

    watched.replace("gate\n")
    watched.poll(5)
    assert len(errors) == 2
    assert "line 1" in errors[1]


def test_a_file_that_is_gone_changes_nothing_until_it_is_back(
    watched: Watched, errors: list[str]
) -> None:
    watched.path.unlink()
    watched.poll(5)

    assert watched.accepts(OLD_TOKEN)
    assert len(errors) == 1

    watched.replace(f"{NEW}\n")
    watched.poll()
    assert watched.accepts(NEW_TOKEN)


def test_a_file_whose_permissions_are_mended_is_read_again(
    watched: Watched, errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.replace(f"{NEW}\n")

    def denied(*_: object) -> None:
        raise BadKeyFile("cannot read it: Permission denied")

    with monkeypatch.context() as patched:
        # A test that runs as root can read anything.
        patched.setattr("app.key_file.read_keys", denied)
        watched.poll(5)
    assert len(errors) == 1

    watched.path.chmod(0o400)
    watched.poll()

    assert watched.accepts(NEW_TOKEN)


def test_a_change_while_the_service_starts_is_noticed(file: Path) -> None:
    watched = Watched(file)
    watched.path.write_text(f"{NEW}\n\n")
    os.utime(watched.path, ns=(1, 1))

    watched.poll()

    assert watched.accepts(NEW_TOKEN)


def test_the_service_is_never_left_open(file: Path, errors: list[str]) -> None:
    file.write_text(f"{OLD}\n")
    authenticator = Authenticator(read_keys(file, ()), allow_unauthenticated=True)
    key_file = KeyFile(file, ())
    for text in ("", "# none\n"):
        file.write_text(text)
        asyncio.run(key_file.reload(authenticator))

    assert authenticator.enabled
    assert all("has no API keys" in each for each in errors)
    assert len(errors) == 2


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The error lines that are logged."""
    logged: list[str] = []

    class Log:
        def error(self, event: str, **more: object) -> None:
            logged.append(f"{event} {more}")

        def info(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr("app.key_file.get_logger", Log)
    return logged
