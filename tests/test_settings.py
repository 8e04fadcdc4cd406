"""Configuration, and the messages about mistakes in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import BadSettings, Settings, load_settings, redact_url

DIGEST = "0123456789abcdef" * 4
OTHER_DIGEST = "fedcba9876543210" * 4


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in a folder whose only .env is the test's own."""
    monkeypatch.chdir(tmp_path)


def refused(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as refusal:
        load_settings().check_bind()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


KUBERNETES = {
    "ARBITER_SERVICE_HOST": "10.96.7.1",
    "ARBITER_SERVICE_PORT": "8000",
    "ARBITER_SERVICE_PORT_HTTP": "8000",
    "ARBITER_PORT": "tcp://10.96.7.1:8000",
    "ARBITER_PORT_8000_TCP": "tcp://10.96.7.1:8000",
    "ARBITER_PORT_8000_TCP_PROTO": "tcp",
    "ARBITER_PORT_8000_TCP_PORT": "8000",
    "ARBITER_PORT_8000_TCP_ADDR": "10.96.7.1",
    "ARBITER_REPLICAS_SERVICE_HOST": "fd00::1",
}
"""What a pod finds beside Services named arbiter and arbiter-replicas."""


def test_variables_of_a_kubernetes_service_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)

    chosen = load_settings()

    assert chosen.port == 8000
    assert chosen.ignored == sorted(KUBERNETES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARBITER_SERVICE_HOST", "example.org"),
        ("ARBITER_SERVICE_PORT", "http"),
        ("ARBITER_PORT", "http://10.96.7.1:8000"),
        ("ARBITER_PORT_8000_TCP", "8000"),
        ("ARBITER_PORT_HTTP", "8000"),
    ],
)
def test_what_only_looks_like_them_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert name in refused(monkeypatch, **{name: value})


def test_a_value_may_end_in_a_line_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ARBITER_PORT": "8001\n",
        "ARBITER_HOST": "127.0.0.2\r\n",
        "ARBITER_API_KEYS": f"gate:proxy:{DIGEST}\n",
        "ARBITER_STORE_URL": "redis://:secret@localhost\n",
        "ARBITER_LOG_LEVEL": "debug\n",
        "ARBITER_AUDIT_LOG": "stdout\n",
    }.items():
        monkeypatch.setenv(name, value)

    chosen = load_settings()

    assert (chosen.port, chosen.host, chosen.log_level) == (8001, "127.0.0.2", "debug")
    assert chosen.api_keys[0].digest == DIGEST
    assert (chosen.store_url, chosen.audit_log) == ("redis://:secret@localhost", "stdout")


def test_a_variable_may_stand_in_env_once() -> None:
    Path(".env").write_text("ARBITER_PORT=1\nPATH=a\nPATH=b\nARBITER_PORT=2\n")

    with pytest.raises(BadSettings, match="sets ARBITER_PORT twice"):
        load_settings()


def test_the_defaults_are_as_documented() -> None:
    chosen = load_settings()

    assert (chosen.host, chosen.port, chosen.store_url) == ("127.0.0.1", 8000, "memory://")
    assert (chosen.cleanup_interval_secs, chosen.retention_secs) == (60, 300)
    assert (chosen.max_time_limit_secs, chosen.max_sessions) == (604_800, 1_000_000)
    assert chosen.max_active_sessions_per_agent is None
    assert (chosen.api_keys, chosen.allow_unauthenticated, chosen.workers) == ((), False, 1)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ARBITER_PORTT": "1"}, "unknown setting ARBITER_PORTT"),
        ({"ARBITER_port": "1"}, "unknown setting ARBITER_port"),
        ({"ARBITER_API_KEY": "a"}, "unknown setting ARBITER_API_KEY"),
        ({"ARBITER_PORT": "http"}, "ARBITER_PORT must be "),
        ({"ARBITER_PORT": "70000"}, "ARBITER_PORT must be "),
        ({"ARBITER_PORT": ""}, "ARBITER_PORT must be "),
        ({"ARBITER_RETENTION_SECS": "-1"}, "ARBITER_RETENTION_SECS must be "),
        ({"ARBITER_CLEANUP_INTERVAL_SECS": "0"}, "ARBITER_CLEANUP_INTERVAL_SECS must be "),
        ({"ARBITER_CLEANUP_INTERVAL_SECS": "nan"}, "ARBITER_CLEANUP_INTERVAL_SECS must be "),
        ({"ARBITER_ALLOW_UNAUTHENTICATED": "maybe"}, "ARBITER_ALLOW_UNAUTHENTICATED: "),
        ({"ARBITER_LOG_LEVEL": "loud"}, "ARBITER_LOG_LEVEL: "),
        ({"ARBITER_STORE_URL": "mongo://x"}, "use one of: memory://"),
        ({"ARBITER_STORE_URL": "memory://x"}, "write memory://"),
        ({"ARBITER_STORE_URL": "redis:localhost"}, "write // after the scheme"),
        ({"ARBITER_STORE_URL": "sqlite:///sessions.db"}, "means the file /sessions.db; write"),
        ({"ARBITER_API_KEYS": "gate:proxy:nope"}, "ARBITER_API_KEYS: "),
        ({"ARBITER_API_KEYS": f"a:proxy:{DIGEST},a:proxy:{DIGEST}"}, "there twice"),
        ({"ARBITER_API_KEYS": f"a:proxy:{DIGEST},a:admin:{OTHER_DIGEST}"}, "same scope"),
        ({"ARBITER_API_KEYS": f"a:proxy:{DIGEST},"}, "ARBITER_API_KEYS: "),
        ({"ARBITER_API_KEYS_FILE": ""}, "ARBITER_API_KEYS_FILE: give the absolute path"),
        ({"ARBITER_API_KEYS_FILE": "keys"}, "ARBITER_API_KEYS_FILE: give the absolute path"),
        ({"ARBITER_WORKERS": "2"}, "ARBITER_WORKERS must be 1 with the memory store"),
        ({"ARBITER_HOST": "0.0.0.0"}, "refusing to listen on 0.0.0.0"),
        ({"ARBITER_HOST": "::"}, "refusing to listen on ::"),
        ({"ARBITER_HOST": "example.org", "ARBITER_API_KEYS": ""}, "refusing to listen on"),
    ],
)
def test_a_bad_setting_is_explained_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    assert says in refused(monkeypatch, **variables)


NUMBERS = {
    "ARBITER_PORT": (0, 65_535),
    "ARBITER_CLEANUP_INTERVAL_SECS": (0.1, 86_400),
    "ARBITER_RETENTION_SECS": (0, 316_224_000),
    "ARBITER_MAX_TIME_LIMIT_SECS": (1, 316_224_000),
    "ARBITER_MAX_ACTIVE_SESSIONS_PER_AGENT": (0, 1_000_000),
    "ARBITER_MAX_SESSIONS": (1, 100_000_000),
    "ARBITER_WORKERS": (1, 256),
    "ARBITER_START_TIMEOUT_SECS": (1, 3600),
    "ARBITER_MAX_CONNECTIONS": (1, 10_000_000),
    "ARBITER_MAX_REQUESTS_IN_FLIGHT": (1, 1_000_000),
    "ARBITER_MAX_REMEMBERED_CALLS": (1, 1_000_000_000),
    "ARBITER_MAX_QUEUE_DELAY_SECS": (0, 60),
    "ARBITER_REQUEST_TIMEOUT_SECS": (0.1, 3600),
    "ARBITER_KEEP_ALIVE_SECS": (0, 86_400),
    "ARBITER_SHUTDOWN_DELAY_SECS": (0, 3600),
    "ARBITER_SHUTDOWN_GRACE_SECS": (0, 3600),
}


@pytest.mark.parametrize(("name", "bounds"), NUMBERS.items(), ids=NUMBERS)
def test_every_number_has_a_floor_and_a_ceiling(
    monkeypatch: pytest.MonkeyPatch, name: str, bounds: tuple[float, float]
) -> None:
    low, high = bounds
    for text in (str(low - 0.05), str(low - 1), str(high + 1), "nan", "inf", "1e999", "many"):
        sentence = refused(monkeypatch, **{name: text})
        assert sentence.startswith(f"{name} must be ")
        assert f"from {low:g} to {high}" in sentence

    # Redis, because the other stores refuse several workers.
    for value in (low, high):
        assert Settings.model_fields[name.removeprefix("ARBITER_").lower()]
        monkeypatch.setenv("ARBITER_STORE_URL", "redis://localhost")
        monkeypatch.setenv(name, f"{value}")
        load_settings()


def test_every_number_is_in_the_table() -> None:
    numeric = {
        f"ARBITER_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if any(kind in str(field.annotation) for kind in ("int", "float"))
    }

    assert numeric == NUMBERS.keys()


def test_a_malformed_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DIGEST not in refused(monkeypatch, ARBITER_API_KEYS=f"a:boss:{DIGEST}")


def test_an_explicit_zero_is_not_taken_for_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARBITER_MAX_ACTIVE_SESSIONS_PER_AGENT", "0")
    monkeypatch.setenv("ARBITER_RETENTION_SECS", "0")

    chosen = load_settings()

    assert (chosen.max_active_sessions_per_agent, chosen.retention_secs) == (0, 0)


def test_with_keys_any_address_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARBITER_HOST", "0.0.0.0")
    monkeypatch.setenv("ARBITER_API_KEYS", f"gate:proxy:{DIGEST}, ops:operate:{DIGEST}")

    chosen = load_settings()

    chosen.check_bind()
    assert [key.name for key in chosen.api_keys] == ["gate", "ops"]


def test_settings_can_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("ARBITER_PORT=9000\nOTHER=1\n")
    assert load_settings().port == 9000

    (tmp_path / ".env").write_text("ARBITER_PROT=9000\n")
    assert "ARBITER_PROT" in refused(monkeypatch)


def test_the_keys_of_both_variables_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(f"gate:proxy:{DIGEST}\n")
    monkeypatch.setenv("ARBITER_HOST", "0.0.0.0")
    monkeypatch.setenv("ARBITER_API_KEYS_FILE", f"{tmp_path}/keys")
    load_settings().check_bind()

    monkeypatch.setenv("ARBITER_API_KEYS", f"gate:proxy:{OTHER_DIGEST}")

    assert {key.digest for key in load_settings().load_keys()} == {DIGEST, OTHER_DIGEST}


@pytest.mark.parametrize(
    "text",
    [
        b"ARBITER_API_KEYS: gate:proxy:" + DIGEST.encode(),
        b"ARBITER_API_KEYS",
        b"ARBITER_API_KEYS='gate",
        b"ARBITER_API_KEYS=\xff",
    ],
)
def test_a_line_of_the_file_that_sets_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    (tmp_path / ".env").write_bytes(text)

    assert ".env" in refused(monkeypatch)


def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARBITER_API_KEYS", f"gate:proxy:{DIGEST}")

    printed = load_settings().printable()

    assert printed["ARBITER_API_KEYS"] == "gate:proxy:***"
    assert DIGEST not in str(printed)
    assert DIGEST not in repr(load_settings())


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("memory://", "memory://"),
        ("redis://u:pw@host:1/0", "redis://u:***@host:1/0"),
        ("redis://:pw@host", "redis://:***@host"),
        ("redis://host?password=pw", "redis://host?***"),
    ],
)
def test_passwords_in_urls_are_not_printed(url: str, printed: str) -> None:
    assert redact_url(url) == printed


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)} | variables,
        timeout=60,
    )


class TestCommands:
    def test_a_bad_setting_ends_a_command_with_exit_code_2(self) -> None:
        for command in ("serve", "config"):
            ended = run(command, ARBITER_PORT="x")
            assert ended.returncode == 2
            assert ended.stderr.startswith("arbiter: ARBITER_PORT must be ")
            assert ended.stderr.count("\n") == 1

    def test_uvicorn_reports_the_same_error(self) -> None:
        root = Path(__file__).parent.parent
        ended = subprocess.run(
            [sys.executable, "-m", "uvicorn", "app.main:app"],
            capture_output=True,
            check=False,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root), "ARBITER_PORT": "x"},
            timeout=60,
        )

        assert ended.returncode == 2
        assert ended.stderr.startswith("arbiter: ARBITER_PORT must be ")

    def test_uvicorn_workers_cannot_share_a_memory_store(self) -> None:
        root = Path(__file__).parent.parent
        served = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app.main:app", "--workers", "2", "--port", "0"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        try:
            assert served.stderr is not None
            said = next(line for line in served.stderr if line.startswith("arbiter: "))
        finally:
            served.terminate()
            served.communicate(timeout=60)

        assert "starts worker processes cannot be used with the memory store" in said

    def test_config_prints_every_setting_redacted(self) -> None:
        printed = run("config", ARBITER_API_KEYS=f"gate:proxy:{DIGEST}").stdout

        assert "ARBITER_PORT=8000\n" in printed
        assert "ARBITER_API_KEYS=gate:proxy:***\n" in printed

    @pytest.mark.parametrize("command", ["serve", "config"])
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (f"gate:boss:{DIGEST}", ", line 1: an API key's scope must be one of"),
            ("# none", " has no API keys"),
            (None, ": No such file or directory"),
        ],
    )
    def test_a_faulty_key_file_is_an_error_at_start(
        self, tmp_path: Path, command: str, text: str | None, says: str
    ) -> None:
        file = tmp_path / "keys"
        if text is not None:
            file.write_text(text)

        ended = run(
            command,
            ARBITER_API_KEYS_FILE=str(file),
            ARBITER_PORT="0",
            ARBITER_STORE_URL="redis://127.0.0.1:1",
            ARBITER_WORKERS="2",
        )

        assert ended.returncode == 2
        assert ended.stderr.startswith("arbiter: ARBITER_API_KEYS_FILE: ")
        assert says in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert DIGEST not in ended.stderr

    def test_config_prints_the_path_of_the_key_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"gate:proxy:{DIGEST} max_tier=public\n")

        printed = run("config", ARBITER_API_KEYS_FILE=str(file)).stdout

        assert f"ARBITER_API_KEYS_FILE={file}\n" in printed
        assert DIGEST not in printed

    def test_a_new_key_can_be_configured(self) -> None:
        made = run("keys", "new", "--name", "gate", "--scope", "proxy").stdout.splitlines()

        assert made[3].startswith("Bearer gate.")
        assert run("config", ARBITER_API_KEYS=made[1]).returncode == 0

    def test_an_invalid_name_of_a_key_is_refused(self) -> None:
        ended = run("keys", "new", "--name", "a b", "--scope", "proxy")

        assert ended.returncode == 2
        assert "1 to 64" in ended.stderr


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings(_env_file=None).port = 1
