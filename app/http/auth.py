"""API keys and what they may do.

A key is `<name>.<secret>`. The secret is 32 random bytes in url-safe base64; only its
SHA-256 is configured, so that the configuration does not open the door. The secret has
full entropy, which is why one plain hash is enough.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_PROVEN = 1024
"""Headers that are remembered as proven; the scheme and spaces can be written in many ways."""

Server = tuple[str, int | None] | None
"""The address of ours that a request came to, as ASGI gives it."""


class Scope(StrEnum):
    """What a key may do."""

    ADMIN = "admin"
    """Everything."""
    OPERATE = "operate"
    """Read, close, agents, metrics."""
    PROXY = "proxy"
    """Create, get, call, batch."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A configured key."""

    name: str
    scope: Scope
    digest: str = field(repr=False)
    """SHA-256 of the secret, in lower-case hex."""

    @classmethod
    def parse(cls, text: str) -> ApiKey:
        """The key that `<name>:<scope>:<sha256 hex>` describes. Raises `ValueError`, whose
        message does not repeat the text."""
        try:
            name, scope, digest = text.strip().split(":")
        except ValueError:
            raise ValueError("an API key is written <name>:<scope>:<sha256 hex>") from None
        if not _NAME.fullmatch(name):
            raise ValueError("the name of an API key is 1 to 64 of A-Z a-z 0-9 _ -")
        if scope not in list(Scope):
            raise ValueError(f"the scope of an API key is one of {', '.join(Scope)}")
        if not _DIGEST.fullmatch(digest):
            raise ValueError("an API key ends in 64 lower-case hex digits, a SHA-256")
        return cls(name, Scope(scope), digest)

    def __str__(self) -> str:
        return f"{self.name}:{self.scope}:{self.digest}"


def new_key(name: str, scope: Scope) -> tuple[ApiKey, str]:
    """A new key: what to configure, and the token to send. Raises `ValueError` for a name
    that a key cannot have."""
    secret = urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    digest = sha256(secret.encode()).hexdigest()
    return ApiKey.parse(f"{name}:{scope}:{digest}"), f"{name}.{secret}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    name: str
    scope: Scope

    def may(self, allowed: Iterable[Scope]) -> bool:
        """Whether this caller may use something that is for `allowed`."""
        return self.scope is Scope.ADMIN or self.scope in allowed


_NOBODY: tuple[bytes, Caller | None] = (bytes(32), None)


class Unauthenticated(Exception):
    """The request does not prove who sent it; the message says what to send."""


class Authenticator:
    """Tells who sent a request.

    Without keys everybody is an admin, but only on loopback addresses, unless
    `allow_unauthenticated`: a server that is bound elsewhere by mistake stays shut.
    """

    def __init__(self, keys: Iterable[ApiKey], *, allow_unauthenticated: bool) -> None:
        self._known: dict[bytes, tuple[bytes, Caller | None]] = {
            key.name.encode(): (bytes.fromhex(key.digest), Caller(key.name, key.scope))
            for key in keys
        }
        self._proven: dict[bytes, Caller] = {}
        self._open_everywhere = allow_unauthenticated
        self._anyone = Caller("", Scope.ADMIN)

    @property
    def enabled(self) -> bool:
        """Whether callers must send a key."""
        return bool(self._known)

    def identify(self, authorization: bytes | None, server: Server) -> Caller:
        """The caller with this `Authorization` header, who reached us at `server`. Raises
        `Unauthenticated`."""
        if not self._known:
            if self._open_everywhere or _is_local(server):
                return self._anyone
            raise Unauthenticated(
                "This service has no API keys and answers on loopback addresses only."
            )
        if authorization is None:
            raise Unauthenticated("Send one header: Authorization: Bearer <name>.<secret>")
        # A header that was proven before. Looking it up compares a keyed 64-bit hash of the
        # whole first, so that its timing says nothing about how much of a guess is right.
        proven_before = self._proven.get(authorization)
        if proven_before is not None:
            return proven_before
        caller = self._prove(authorization)
        if len(self._proven) < MAX_PROVEN:
            self._proven[authorization] = caller
        return caller

    def _prove(self, authorization: bytes) -> Caller:
        scheme, _, token = authorization.partition(b" ")
        name, _, secret = token.strip().partition(b".")
        # An unknown name costs the same hash and comparison as a known one.
        expected, caller = self._known.get(name, _NOBODY)
        proven = compare_digest(sha256(secret).digest(), expected)
        if not proven or caller is None or scheme.lower() != b"bearer":
            raise Unauthenticated("This API key is not known; send Bearer <name>.<secret>.")
        return caller


def _is_local(server: Server) -> bool:
    """Whether only this machine can reach us there; a Unix socket has no port."""
    if server is None:
        return False
    host, port = server
    return port is None or is_loopback(host)


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether `host`, an address or `localhost`, is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
