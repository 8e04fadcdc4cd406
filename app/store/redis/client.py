"""Sends scripts to Redis or Valkey: those of one turn of the event loop as one pipeline.

Nothing is sent twice, except a script that the engine says it does not know. A request that
is cancelled or out of time leaves its pipeline alone, so that no reply can reach another.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

from hiredis import pack_command
from redis.asyncio import RedisCluster
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)
from redis.exceptions import (
    ConnectionError as CannotConnect,
)
from redis.exceptions import (
    TimeoutError as TooSlow,
)

from app.domain.errors import StoreUnavailable, StoreUnreachable, StoreUnusable
from app.store.availability import Availability
from app.store.redis.scripts import Script
from app.store.redis.url import Client, RedisUrl

GRACE_TURNS = 20
"""Turns of the event loop that a request waits for after its deadline. If our own loop is
behind, a reply may already be in the socket buffer. A few more turns let us read it, so that we
do not report a counted call as failed."""

MOST_AT_ONCE = 256
"""Scripts in one pipeline."""

PIPELINES = 2
"""Pipelines under way to one engine. By measurement more of them, with less in each, are
slower: a pipeline costs the client as much as ten scripts in it."""

LOOK_AGAIN_SECS = 0.1
"""How often at most a cluster is asked for its nodes while some of them do not answer."""

_MIN_REDIS, _MIN_VALKEY = 7, 8

_REASONS: list[tuple[type[Exception], str]] = [
    (AuthenticationError, "it refused the user or the password"),
    (AuthorizationError, "the user may not do this"),
    (BusyLoadingError, "it is still loading its data"),
    (TooSlow, "it did not answer in time"),
    (MasterNotFoundError, "no reachable sentinel knows a live primary with this name"),
    (
        CannotConnect,
        "there is no connection to it; start the engine, or correct ARBITER_STORE_URL",
    ),
    (OutOfMemoryError, "it is out of memory"),
    (ReadOnlyError, "it is a read-only replica"),
    (ClusterDownError, "the cluster is down"),
    (RedisClusterException, "the cluster is down"),
]


def reason(error: Exception) -> str:
    """Why the engine cannot be used, for an operator. Without data of requests."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is for another host, or from a CA that SSL_CERT_FILE must name"
    for kind, text in _REASONS:
        if isinstance(error, kind):
            return text
    # The first word of an error of the engine says of what kind it is.
    return f"it failed ({type(error).__name__}: {str(error).partition(' ')[0][:40]})"


class _Batch:
    """Scripts that are sent together, and whether the engine can have received them."""

    def __init__(self) -> None:
        self.is_sent = False
        self.is_abandoned = False
        """Whether a request that it holds has been answered: it must not be sent any more."""


_batch: ContextVar[_Batch | None] = ContextVar("batch", default=None)
"""What the task is sending, for its connection."""


def _connection(kind: type[Any]) -> type[Any]:
    """A kind of connection that packs commands in C, and marks a batch as sent just before it
    writes it. redis-py's asyncio connections pack in Python, which took a third of the client's
    time."""

    class Connection(kind):  # type: ignore[misc]  # mypy knows no base classes made at run time
        def pack_command(self, *arguments: Any) -> list[bytes]:
            return [pack_command(arguments)]

        def pack_commands(self, commands: Sequence[tuple[Any, ...]]) -> list[bytes]:
            return [b"".join(map(pack_command, commands))]

        async def connect_check_health(self, *arguments: Any, **options: Any) -> None:
            # What connecting sends is not the batch.
            token = _batch.set(None)
            try:
                await super().connect_check_health(*arguments, **options)
            finally:
                _batch.reset(token)

        async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
            batch = _batch.get()
            if batch is not None:
                if not self.is_connected:
                    await self.connect_check_health(check_health=False)
                if batch.is_abandoned:
                    raise TooSlow
                batch.is_sent = True
            await super().send_packed_command(*arguments, **options)

    return Connection


class Step(NamedTuple):
    """A script to run with keys of one slot."""

    script: Script
    keys: tuple[str, ...]
    arguments: Sequence[Any]

    def command(self, *, by_name: bool) -> tuple[Any, ...]:
        """As the engine wants it, by the name of the script or with its text."""
        how = ("EVALSHA", self.script.sha) if by_name else ("EVAL", self.script.text)
        return (*how, len(self.keys), *self.keys, *self.arguments)


_REFUSALS = (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
)
"""Replies to a script that has changed nothing. An engine without memory, and a replica, refuse
the first write of a script or none."""

_LOST = (CannotConnect, TooSlow, ClusterDownError, RedisClusterException)
_ERRORS = (RedisError, RedisClusterException, OSError)


class _Request:
    """A script that someone waits for."""

    __slots__ = ("batch", "future", "step")

    def __init__(self, step: Step, future: asyncio.Future[Any]) -> None:
        self.step = step
        self.future = future
        self.batch: _Batch | None = None

    def fail(self, *, refused: bool = False) -> None:
        """Raise an error to who waits: whether anything can have been recorded."""
        if not self.future.done():
            is_sent = self.batch is not None and self.batch.is_sent
            unknown = is_sent and not refused
            self.future.set_exception(StoreUnavailable() if unknown else StoreUnreachable())


class _Lane:
    """What is on its way to one engine. In a cluster each has its own, so that one that hangs
    holds nobody up who does not need it."""

    def __init__(self) -> None:
        self.waiting: list[_Request] = []
        self.under_way = 0


class ScriptClient:
    """A Redis or Valkey: one, behind sentinels, or a cluster."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._availability = Availability()
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._turn: list[_Request] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and see whether the engine can be trusted. Raises `StoreUnusable`."""
        self._loop = asyncio.get_running_loop()
        self._client: Client = self._url.client()
        # Kept, since every script asks, and isinstance() is slow with this class.
        self._cluster = self._client if isinstance(self._client, RedisCluster) else None
        if isinstance(self._client, RedisCluster):
            kinds = self._client.connection_kwargs
            kinds["connection_class"] = _connection(kinds["connection_class"])
        else:
            pool = self._client.connection_pool
            pool.connection_class = _connection(pool.connection_class)
        try:
            await self._check()
        except _ERRORS as error:
            await self._disconnect()
            raise StoreUnusable(f"cannot use {self._url}: {reason(error)}") from error
        except StoreUnusable as error:
            await self._disconnect()
            raise StoreUnusable(f"cannot use {self._url}: {error}") from None

    async def _disconnect(self) -> None:
        # With TLS, an engine that hangs never confirms the end of a connection.
        with suppress(*_ERRORS):
            await self._client.aclose()

    async def _check(self) -> None:
        if isinstance(self._client, RedisCluster):
            found = await self._client.info(target_nodes=RedisCluster.PRIMARIES)
            engines = list(found.values()) if "redis_version" not in found else [found]
        else:
            engines = [await self._client.info()]
        for engine in engines:
            _check_version(engine)
            policy = engine["maxmemory_policy"]
            if policy != "noeviction" and not self._url.allow_eviction:
                raise StoreUnusable(
                    f"its maxmemory-policy is {policy}, so that it may forget sessions and "
                    "give out their budgets again; set noeviction, or say ?allow_eviction=true"
                )

    async def aclose(self) -> None:
        """Wait for what is under way, and disconnect."""
        while under_way := self._sending | ({self._looking} if self._looking else set()):
            await asyncio.wait(under_way)
        await self._disconnect()
        # Connections that were given up at once are closed in the next turn.
        await asyncio.sleep(0)

    async def run(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        """What the script returns. Raises `StoreUnavailable` if that cannot be known within
        the deadline, and `StoreUnreachable` if it has not run and will not."""
        return await self.submit(Step(script, keys, arguments))

    async def submit_all(self, steps: Sequence[Step]) -> list[Any]:
        """What the scripts return. Raises `StoreUnavailable` if one of them failed."""
        found: list[Any] = []
        for first in range(0, len(steps), MOST_AT_ONCE):
            some = steps[first : first + MOST_AT_ONCE]
            found += await asyncio.gather(*(self.submit(step) for step in some))
        return found

    async def exists(self, key: str) -> bool:
        """Whether there is such a key. Raises `StoreUnavailable`."""
        try:
            return bool(await self._client.exists(key))
        except _ERRORS as error:
            self._availability.failed(reason(error))
            raise StoreUnreachable from error

    def submit(self, step: Step) -> asyncio.Future[Any]:
        """Send a script with all others of this turn of the event loop. See `run`."""
        if not self._turn:
            self._loop.call_soon(self._end_turn)
        request = _Request(step, self._loop.create_future())
        self._turn.append(request)
        self._lane(step).waiting.append(request)
        return request.future

    def _lane(self, step: Step) -> _Lane:
        if self._cluster is None:
            return self._lanes[""]
        try:
            node = self._cluster.get_node_from_key(step.keys[0])
        except RedisClusterException:
            # Nobody serves the slot, which the pipeline will find as well.
            node = None
        return self._lanes[node.name if node else ""]

    def _give_up(self, turn: list[_Request], grace: int) -> None:
        late = [request for request in turn if not request.future.done()]
        if late and grace:
            self._loop.call_soon(self._give_up, late, grace - 1)
            return
        for request in late:
            if request.batch is not None and not request.batch.is_sent:
                request.batch.is_abandoned = True
            request.fail()
        if late:
            self._availability.failed(reason(TooSlow()))

    def _end_turn(self) -> None:
        # Start the deadline now: the time until here was spent by us, not by the engine.
        self._loop.call_later(self._url.deadline_secs, self._give_up, self._turn, GRACE_TURNS)
        self._turn = []
        for lane in self._lanes.values():
            self._send_waiting(lane)

    def _send_waiting(self, lane: _Lane) -> None:
        while lane.waiting and lane.under_way < PIPELINES:
            # Drop requests whose caller has given up. They have not been sent, so they must
            # not take effect.
            requests = [each for each in lane.waiting[:MOST_AT_ONCE] if not each.future.done()]
            del lane.waiting[:MOST_AT_ONCE]
            if requests:
                lane.under_way += 1
                task = self._loop.create_task(self._send(lane, requests))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, lane: _Lane, requests: list[_Request]) -> None:
        try:
            unknown = await self._pipeline(requests, by_name=True)
            if unknown:
                await self._pipeline(unknown, by_name=False)
        except _ERRORS as error:
            self._failed(requests, error)
        finally:
            lane.under_way -= 1
            self._send_waiting(lane)

    async def _pipeline(self, requests: list[_Request], *, by_name: bool) -> list[_Request]:
        """Run the scripts; those that the engine does not know."""
        pipeline = self._client.pipeline(transaction=False)
        batch = _Batch()
        for request in requests:
            request.batch = batch
            pipeline.execute_command(*request.step.command(by_name=by_name))
        # For this task and those that it starts.
        _batch.set(batch)
        results = await pipeline.execute(raise_on_error=False)
        unknown = []
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, NoScriptError):
                unknown.append(request)
            elif isinstance(result, Exception):
                self._failed([request], result)
            else:
                self._availability.succeeded()
                if not request.future.done():
                    request.future.set_result(result)
        return unknown

    def _failed(self, requests: list[_Request], error: Exception) -> None:
        self._availability.failed(reason(error))
        for request in requests:
            request.fail(refused=isinstance(error, _REFUSALS))
        lost = isinstance(error, _LOST)
        if lost and self._cluster is not None and self._looking is None:
            self._looking = self._loop.create_task(self._look_around(self._cluster))

    async def _look_around(self, cluster: RedisCluster) -> None:
        """Find out which nodes the cluster has now; pipelines of the client do not."""
        try:
            await cluster.nodes_manager.initialize()
            await asyncio.sleep(LOOK_AGAIN_SECS)
        except _ERRORS as error:
            self._availability.failed(reason(error))
        finally:
            self._looking = None


def _check_version(engine: dict[str, Any]) -> None:
    name, least = "Redis", _MIN_REDIS
    version = str(engine["redis_version"])
    if "valkey_version" in engine:
        name, least, version = "Valkey", _MIN_VALKEY, str(engine["valkey_version"])
    if int(version.partition(".")[0]) < least:
        raise StoreUnusable(f"it is {name} {version}, and {least} or newer is needed")
