"""API keys and their scopes.

A key is `<name>.<secret>`. The secret is 32 random bytes in url-safe base64. Only its SHA-256
is configured, so a leaked configuration grants no access. One plain hash is enough because the
secret has full entropy. A name may have two secrets while it is rotated.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from typing import Any, NamedTuple

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WRONG_NAME = "an API key's name must be 1 to 64 characters A-Z a-z 0-9 _ -"
_LOOPBACK_HOST = re.compile(rb"(?i:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_PROVEN = 1024
"""Maximum number of verified headers to cache. One key can be written in many ways, since the
case of the scheme and the number of spaces vary."""

SECRETS_OF_A_NAME = 2
"""The old secret and the new one."""

Server = tuple[str, int | None] | None
"""The local address that received a request: `server` of the ASGI scope."""


class Scope(StrEnum):
    """What a key allows."""

    ADMIN = "admin"
    """Everything."""
    OPERATE = "operate"
    """Read, list, change and close sessions; agents; denials, this process, metrics."""
    PROXY = "proxy"
    """Create, read and close sessions; calls and batches."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is configured."""

    name: str
    scope: Scope
    digest: str = field(repr=False)
    """SHA-256 of the secret, in lower-case hex."""
    ceilings: Any = None
    """What the key may grant at most. HTTP only passes it on."""

    @classmethod
    def parse(cls, text: str) -> ApiKey:
        """Parse `<name>:<scope>:<sha256 hex>`. Raises `ValueError`, whose message does not
        repeat the text."""
        try:
            name, scope, digest = text.strip().split(":")
        except ValueError:
            raise ValueError("an API key must be written <name>:<scope>:<sha256 hex>") from None
        if not _NAME.fullmatch(name):
            raise ValueError(_WRONG_NAME)
        if scope not in list(Scope):
            raise ValueError(f"an API key's scope must be one of {', '.join(Scope)}")
        if not _DIGEST.fullmatch(digest):
            raise ValueError("an API key must end in a SHA-256, 64 lower-case hex digits")
        return cls(name, Scope(scope), digest)

    def __str__(self) -> str:
        return f"{self.name}:{self.scope}:{self.digest}"


class KeyRing:
    """API keys by name. A name has one secret, or two while it is rotated."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self.by_name: dict[str, list[ApiKey]] = {}
        for key in keys:
            self.add(key)

    def add(self, key: ApiKey) -> None:
        """Add a key. Raises `ValueError` if it cannot stand beside the others; the message
        does not repeat the key."""
        same = self.by_name.get(key.name, [])
        if any(each.digest == key.digest for each in same):
            raise ValueError("the same API key is there twice")
        if len(same) == SECRETS_OF_A_NAME:
            raise ValueError("three API keys have the same name; a name may have two secrets")
        if any((each.scope, each.ceilings) != (key.scope, key.ceilings) for each in same):
            raise ValueError(
                "two API keys with the same name must have the same scope and the same limits"
            )
        self.by_name[key.name] = [*same, key]

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All keys."""
        return tuple(key for same in self.by_name.values() for key in same)


def new_key(name: str, scope: Scope) -> tuple[ApiKey, str]:
    """Make a key. Return what to configure and the token to send. Raises `ValueError` if the
    name is invalid."""
    if not _NAME.fullmatch(name):
        raise ValueError(_WRONG_NAME)
    secret = urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    digest = sha256(secret.encode()).hexdigest()
    return ApiKey.parse(f"{name}:{scope}:{digest}"), f"{name}.{secret}"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    name: str
    scope: Scope
    ceilings: Any = None
    """What the caller may grant at most; `None` without limits of its own."""

    def may(self, allowed: Iterable[Scope]) -> bool:
        """Return whether the caller has one of the `allowed` scopes, or admin."""
        return self.scope is Scope.ADMIN or self.scope in allowed


NOBODY = Caller("", Scope.PROXY)
"""The caller of a request whose key has not been checked."""


class _Known(NamedTuple):
    """A name that may be sent, with the digests of its secrets."""

    first: bytes
    second: bytes
    """The same as the first if there is only one secret."""
    caller: Caller | None


_UNKNOWN = _Known(bytes(32), bytes(32), None)


class Unauthenticated(Exception):
    """The request has no valid API key. The message says what to send."""


class Authenticator:
    """Identifies the callers of requests.

    Without keys every caller is an admin, but only on loopback addresses, so a server that
    listens elsewhere by mistake is not open. `allow_unauthenticated` lifts that restriction.
    """

    def __init__(self, keys: Iterable[ApiKey], *, allow_unauthenticated: bool) -> None:
        self._known = _known(keys)
        self._proven: dict[bytes, Caller] = {}
        self._open_everywhere = allow_unauthenticated
        self._anyone = Caller("", Scope.ADMIN)

    def replace_keys(self, keys: Iterable[ApiKey]) -> None:
        """Accept these keys from now on, and no others. Raises `ValueError`, and changes
        nothing, if there are none: the service would be open then."""
        known = _known(keys)
        if not known:
            raise ValueError("there would be no API keys")
        self._known = known
        # It remembers headers with keys that are gone.
        self._proven = {}

    @property
    def enabled(self) -> bool:
        """Whether callers must send a key."""
        return bool(self._known)

    def serves(self, hosts: Sequence[bytes], server: Server) -> bool:
        """Return whether to serve a request with these `Host` headers, received at `server`.

        Without keys, a loopback address serves only the names of loopback. A web page can make
        a browser on this machine send requests here, but only under the page's own host name
        (DNS rebinding).
        """
        if self._known or self._open_everywhere or not _is_local(server):
            return True
        return all(map(_LOOPBACK_HOST.fullmatch, hosts))

    def identify(self, authorization: bytes | None, server: Server) -> Caller:
        """Return the caller who sent this `Authorization` header to `server`. Pass `None` if
        there is no header, or more than one. Raises `Unauthenticated`."""
        if not self._known:
            if self._open_everywhere or _is_local(server):
                return self._anyone
            raise Unauthenticated(
                "This service has no API keys, so it serves loopback addresses only. Set "
                "ARBITER_API_KEYS."
            )
        if authorization is None:
            raise Unauthenticated(
                "The request needs an API key. Send exactly one header, "
                "Authorization: Bearer <name>.<secret>"
            )
        # The look-up first compares a keyed 64-bit hash of the whole header, so its timing does
        # not reveal how much of a guess is right.
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
        # An unknown name costs the same hash and comparisons as a known one, and one secret the
        # same as two. `or` would skip the second comparison.
        first, second, caller = self._known.get(name, _UNKNOWN)
        digest = sha256(secret).digest()
        proven = compare_digest(digest, first) | compare_digest(digest, second)
        if not proven or caller is None or scheme.lower() != b"bearer":
            raise Unauthenticated(
                "The API key is not valid: its name or its secret is unknown here. Send "
                "Authorization: Bearer <name>.<secret>"
            )
        return caller


def _known(keys: Iterable[ApiKey]) -> dict[bytes, _Known]:
    known = {}
    for name, same in KeyRing(keys).by_name.items():
        digests = [bytes.fromhex(key.digest) for key in same]
        caller = Caller(name, same[0].scope, same[0].ceilings)
        known[name.encode()] = _Known(digests[0], digests[-1], caller)
    return known


def _is_local(server: Server) -> bool:
    """Return whether only this machine can reach `server`. A Unix socket has no port."""
    if server is None:
        return False
    host, port = server
    return port is None or is_loopback(host)


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`, an address or `localhost`."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
