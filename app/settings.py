"""Configuration: environment variables with the prefix `ARBITER_`, and `.env`.

Only the composition root reads it, once. An unknown variable with the prefix is an error,
because a typo must not make the service less safe.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

from annotated_types import Ge, Le
from dotenv.parser import parse_stream
from pydantic import (
    DirectoryPath,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.domain.capacity import StoreLimits
from app.http.auth import ApiKey, KeyRing, is_loopback
from app.key_file import BadKeyFile, read_keys
from app.observability.audit import STDOUT
from app.observability.logs import LogFormat, LogLevel
from app.store import ONE_PROCESS, open_store, scheme_of

PREFIX = "ARBITER_"
TEN_YEARS_SECS = 10 * 366 * 86_400
REDACTED = "***"
_BASE_URL = re.compile(r"https?://[A-Za-z0-9._\[\]:-]+(?:/[A-Za-z0-9._~/-]*)?")
_METHOD = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_KUBERNETES = re.compile(
    r"ARBITER(_[A-Z0-9_]+)?_"
    r"(SERVICE_HOST=[0-9a-fA-F.:]+"
    r"|SERVICE_PORT(_[A-Z0-9_]+)?=\d+"
    r"|PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://\S+"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT=\d+|ADDR=[0-9a-fA-F.:]+))"
)
"""What Kubernetes sets in every pod beside a Service whose name begins with `arbiter`."""


class BadSettings(Exception):
    """The configuration cannot be used. The message says why in one sentence."""


class Settings(BaseSettings):
    """All settings. Durations are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True, env_ignore_empty=False
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    store_url: Annotated[str, Field(repr=False)] = "memory://"
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = ()
    api_keys_file: Path | None = None
    allow_unauthenticated: bool = False
    cleanup_interval_secs: Annotated[float, Field(ge=0.1, le=86_400)] = 60
    retention_secs: Annotated[int, Field(ge=0, le=TEN_YEARS_SECS)] = 300
    max_time_limit_secs: Annotated[int, Field(ge=1, le=TEN_YEARS_SECS)] = 604_800
    max_active_sessions_per_agent: Annotated[int | None, Field(ge=0, le=1_000_000)] = None
    max_sessions: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000
    max_remembered_calls: Annotated[int, Field(ge=1, le=1_000_000_000)] = 2_000_000
    log_level: LogLevel = "info"
    log_format: LogFormat = Field(
        default_factory=lambda: "console" if sys.stderr.isatty() else "json"
    )
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    start_timeout_secs: Annotated[float, Field(ge=1, le=3600)] = 60
    metrics_dir: DirectoryPath | None = None
    audit_log: str | None = None
    max_connections: Annotated[int, Field(ge=1, le=10_000_000)] = 4096
    max_requests_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    max_queue_delay_secs: Annotated[float, Field(ge=0, le=60)] = 0.15
    request_timeout_secs: Annotated[float, Field(ge=0.1, le=3600)] = 10
    keep_alive_secs: Annotated[float, Field(ge=0, le=86_400)] = 75
    public_url: str | None = None
    authz_free_methods: Annotated[tuple[str, ...], NoDecode] = ()
    shutdown_delay_secs: Annotated[float, Field(ge=0, le=3600)] = 0
    shutdown_grace_secs: Annotated[int, Field(ge=0, le=3600)] = 20

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """Variables of the environment that belong to a Kubernetes Service."""
        return self._ignored

    @model_validator(mode="before")
    @classmethod
    def _without_line_end(cls, values: Any) -> Any:
        # A secret that was saved by an editor ends in a line feed.
        return {
            name: value.rstrip("\r\n") if isinstance(value, str) else value
            for name, value in values.items()
        }

    @field_validator("api_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(",") if value.strip() else []
        return KeyRing(map(ApiKey.parse, parts)).keys

    @field_validator("authz_free_methods", mode="before")
    @classmethod
    def _parse_methods(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        methods = tuple(part.strip() for part in value.split(",")) if value.strip() else ()
        for method in methods:
            if not _METHOD.fullmatch(method):
                raise ValueError("write names of methods, separated by commas")
            if method == "tools/call":
                raise ValueError("tools/call is never free: it would not be bounded")
        return methods

    @field_validator("public_url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        if value is not None and not _BASE_URL.fullmatch(value):
            raise ValueError("write http:// or https://, a host, and no query")
        return value and value.rstrip("/")

    @field_validator("api_keys_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("give the absolute path of a file")
        return value

    @field_validator("audit_log")
    @classmethod
    def _file_or_stdout(cls, value: str | None) -> str | None:
        # A relative path would depend on the directory in which the service starts.
        if value is not None and value != STDOUT and not Path(value).is_absolute():
            raise ValueError("give the absolute path of a file, or stdout")
        return value

    @field_validator("store_url")
    @classmethod
    def _known_store(cls, value: str) -> str:
        # Created only to check the URL. A store connects to nothing before it is opened.
        open_store(value, StoreLimits())
        return value

    @model_validator(mode="after")
    def _one_worker_unless_shared(self) -> Settings:
        if self.workers > 1 and (reason := self._one_process()):
            raise ValueError(f"ARBITER_WORKERS must be 1 {reason}")
        return self

    def check_workers(self) -> None:
        """Raise `BadSettings` if several processes cannot share the store."""
        if reason := self._one_process():
            raise BadSettings(f"a server that starts worker processes cannot be used {reason}")

    def _one_process(self) -> str | None:
        scheme = scheme_of(self.store_url)
        reason = ONE_PROCESS.get(scheme)
        return reason and f"with the {scheme} store: {reason}"

    def load_keys(self) -> tuple[ApiKey, ...]:
        """Return the keys of `ARBITER_API_KEYS` and of the file. Raises `BadSettings` if the
        file cannot be used, or if there is one and no keys at all."""
        if self.api_keys_file is None:
            return self.api_keys
        try:
            return read_keys(self.api_keys_file, self.api_keys)
        except BadKeyFile as error:
            raise BadSettings(f"{PREFIX}API_KEYS_FILE: {error}") from None

    def check_bind(self) -> None:
        """Raise `BadSettings` if other machines could use the service without a key."""
        has_keys = self.api_keys or self.api_keys_file is not None
        if has_keys or self.allow_unauthenticated or is_loopback(self.host):
            return
        raise BadSettings(
            f"refusing to listen on {self.host} without authentication: set ARBITER_API_KEYS "
            "(make a key with: arbiter keys new --name NAME --scope SCOPE, from the container "
            "image with: docker run --rm arbiter keys new --name NAME --scope SCOPE), or set "
            "ARBITER_ALLOW_UNAUTHENTICATED=true if everyone who can connect may do everything"
        )

    def printable(self) -> dict[str, str]:
        """Return all variables and their values, with secrets redacted."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values["store_url"] = redact_url(self.store_url)
        values["api_keys"] = ",".join(
            f"{key.name}:{key.scope}:{REDACTED}" for key in self.api_keys
        )
        return {
            PREFIX + name.upper(): _text(value)
            for name, value in values.items()
            if value is not None
        }


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def redact_url(url: str) -> str:
    """Return the URL with its password and its query redacted."""
    parts = urlsplit(url)
    if parts.query:
        parts = parts._replace(query=REDACTED)
    if parts.password is None:
        return urlunsplit(parts) if parts.query else url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:{REDACTED}@{host}"))


def load_settings() -> Settings:
    """Read the settings of this process. Raises `BadSettings`."""
    ignored = sorted(
        name for name, value in os.environ.items() if _KUBERNETES.fullmatch(f"{name}={value}")
    )
    for name in ignored:
        # Workers inherit the environment.
        del os.environ[name]
    _refuse_unknown([*os.environ, *_names_in(Path(".env"))])
    try:
        settings = Settings()
    except ValidationError as error:
        raise BadSettings("; ".join(_sentence(each) for each in error.errors())) from None
    settings.ignored.extend(ignored)
    return settings


def _names_in(env_file: Path) -> list[str]:
    """Return the names in `.env`.

    Raises `BadSettings` for a line that would be ignored, because a mistake in the line with
    the API keys must not leave the service open.
    """
    if not env_file.is_file():
        return []
    try:
        bindings = list(parse_stream(io.StringIO(env_file.read_text(encoding="utf-8"))))
    except UnicodeDecodeError:
        raise BadSettings(f"{env_file} is not UTF-8; save it as UTF-8") from None
    for each in bindings:
        if each.error or (each.key is not None and each.value is None):
            raise BadSettings(f"{env_file}, line {each.original.line}: write NAME=value")
    names = [each.key for each in bindings if each.key is not None]
    for name in names:
        if name.upper().startswith(PREFIX) and names.count(name) > 1:
            raise BadSettings(f"{env_file} sets {name} twice; leave one of the lines")
    return names


def _refuse_unknown(names: Iterable[str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(n for n in set(names) if n.upper().startswith(PREFIX) and n not in known)
    if unknown:
        raise BadSettings(
            f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
        )


def _sentence(error: ErrorDetails) -> str:
    """Return a validation error as one sentence, without the value."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    field = Settings.model_fields[name]
    low = next((each.ge for each in field.metadata if isinstance(each, Ge)), None)
    high = next((each.le for each in field.metadata if isinstance(each, Le)), None)
    if high is None:
        return f"{PREFIX}{name.upper()}: {message}"
    kind = "number" if field.annotation is float else "whole number"
    return f"{PREFIX}{name.upper()} must be a {kind} from {low} to {high}"
