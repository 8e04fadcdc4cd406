"""The URL of a Redis or Valkey server, and a client for it.

The client never retries: an admission whose reply was lost may have been counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from typing_extensions import override

Client = Redis | RedisCluster

CONNECTIONS = 8
"""The most connections to one server."""

DEADLINE_MS, MAX_DEADLINE_MS = 250, 60_000

PATIENCE = 4
"""How many deadlines may pass without a reply before its connection is given up."""

_TLS = "rediss"
_CLUSTER, _SENTINEL = "redis+cluster", "redis+sentinel"
_PORTS = {_SENTINEL: 26379}
_OPTIONS = {"tls", "allow_eviction", "deadline_ms"}
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed store URL. Its `repr` contains no password."""

    kind: str
    hosts: tuple[tuple[str, int], ...]
    db: int
    service: str
    """The name by which the sentinels know the primary."""
    tls: bool
    allow_eviction: bool
    deadline_secs: float
    """How long a request waits for a reply."""
    credentials: _Credentials

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Parse `redis://[user:password@]host[:port][/db]`, `rediss://` for TLS,
        `redis+cluster://host,host` or `redis+sentinel://host,host/name[/db]`. The options are
        `?tls=true`, `?allow_eviction=true` and `?deadline_ms=250`.

        Raises `ValueError`, whose message never contains the password.
        """
        if "://" not in url:
            raise ValueError("write // after the scheme, as in redis://localhost:6379")
        try:
            parts = urlsplit(url)
        except ValueError:
            # The original message contains the password.
            raise ValueError(
                "the URL is malformed; write other characters than plain ASCII as %XX"
            ) from None
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        if parts.fragment or len(pairs) > len(options) or not options.keys() <= _OPTIONS:
            raise ValueError(
                "the URL has a fragment, or an unknown or repeated option; the options are "
                "tls=true, allow_eviction=true and deadline_ms=250"
            )
        deadline_ms = options.pop("deadline_ms", str(DEADLINE_MS))
        if not deadline_ms.isdecimal() or not 1 <= int(deadline_ms) <= MAX_DEADLINE_MS:
            raise ValueError(f"deadline_ms must be a whole number from 1 to {MAX_DEADLINE_MS}")
        if not set(options.values()) <= _FLAGS.keys():
            raise ValueError("tls and allow_eviction must be true or false")
        flags = {name: _FLAGS[value] for name, value in options.items()}
        service, db = _path(parts)
        return cls(
            parts.scheme,
            _hosts(parts),
            db,
            service,
            parts.scheme == _TLS or flags.get("tls", False),
            flags.get("allow_eviction", False),
            int(deadline_ms) / 1000,
            _Credentials.of(parts.netloc),
        )

    def __str__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.kind}://{hosts}"

    def client(self) -> Client:
        """Return a client that has not connected yet."""
        timeout_secs = PATIENCE * self.deadline_secs
        common: dict[str, Any] = {
            "username": self.credentials.username,
            "password": self.credentials.password,
            "socket_timeout": timeout_secs,
            "socket_connect_timeout": timeout_secs,
            "retry": Retry(NoBackoff(), 0),
        }
        if self.kind == _CLUSTER:
            nodes = [ClusterNode(host, port) for host, port in self.hosts]
            return RedisCluster(
                startup_nodes=nodes, ssl=self.tls, max_connections=CONNECTIONS, **common
            )
        if self.kind == _SENTINEL:
            sentinel = Sentinel(  # type: ignore[no-untyped-call]
                self.hosts,
                sentinel_kwargs=common | {"ssl": self.tls},
                db=self.db,
                ssl=self.tls,
                **common,
            )
            primary: Redis = sentinel.master_for(
                self.service, _BehindSentinels, max_connections=CONNECTIONS
            )
            return primary
        ((host, port),) = self.hosts
        if self.tls:
            common["connection_class"] = SSLConnection
        pool = BlockingConnectionPool(
            max_connections=CONNECTIONS,
            timeout=timeout_secs,
            host=host,
            port=port,
            db=self.db,
            **common,
        )
        return Redis.from_pool(pool)


class _BehindSentinels(Redis):
    """A primary that sentinels name. Closing it also closes the connections to them."""

    @override
    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        pool: Any = self.connection_pool
        try:
            await super().aclose(close_connection_pool)
        finally:
            await pool.sentinel_manager.aclose()


@dataclass(frozen=True, slots=True, repr=False)
class _Credentials:
    username: str | None = None
    password: str | None = None

    @classmethod
    def of(cls, netloc: str) -> _Credentials:
        before, at, _ = netloc.rpartition("@")
        if not at:
            return cls()
        user, _, password = before.partition(":")
        return cls(unquote(user) or None, unquote(password) or None)


def _hosts(parts: SplitResult) -> tuple[tuple[str, int], ...]:
    before, _, hosts = parts.netloc.rpartition("@")
    if "@" in before:
        raise ValueError(
            "the URL has several @; write user and password once, before all hosts, "
            "and any @ in them as %40"
        )
    listed = hosts.split(",")
    several = parts.scheme in {_CLUSTER, _SENTINEL}
    if len(listed) > 1 and not several:
        raise ValueError(
            "the URL has several hosts; write one, or use redis+cluster:// or redis+sentinel://"
        )
    return tuple(_host(each, _PORTS.get(parts.scheme, 6379)) for each in listed)


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the port must be a number from 1 to 65535") from None
    if not parts.hostname:
        raise ValueError("the URL has no host; write one, as in redis://localhost:6379")
    return parts.hostname, port or default_port


def _path(parts: SplitResult) -> tuple[str, int]:
    """The name of the primary, for sentinels, and the number of the database."""
    pieces = [piece for piece in parts.path.split("/") if piece]
    service = ""
    if parts.scheme == _SENTINEL:
        if not pieces:
            raise ValueError(
                "the URL does not name the primary; write its name after the hosts, as in "
                "redis+sentinel://host/main"
            )
        service = unquote(pieces.pop(0))
    if not pieces:
        return service, 0
    if parts.scheme == _CLUSTER or len(pieces) > 1 or not pieces[0].isdecimal():
        raise ValueError(
            "the path of the URL is not valid; it may only be the number of a database, as in "
            "redis://localhost:6379/0, and redis+cluster:// has none"
        )
    return service, int(pieces[0])
