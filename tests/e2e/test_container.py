"""The container image and the compose file, as far as they can be tested without Docker."""

from __future__ import annotations

import re
import shutil
import socketserver
import struct
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from socket import inet_aton
from typing import Any

import httpx
import pytest
import yaml

from tests.engines import until
from tests.services import ROOT, StartService
from tests.wheel import build, copy, files_of_the_project

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "arbiter"]
REPLICAS = [name for name in OURS if name != "arbiter"]
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
A_RECORD = 1


def instructions() -> list[tuple[str, list[str]]]:
    """Return the instructions of the Dockerfile and their words."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [(words[0], words[1:]) for words in lines]


def admitted_by_dockerignore(name: str) -> bool:
    """Return whether the file reaches the build. The last pattern that matches it decides."""
    path = PurePosixPath(name)
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        candidates = [str(each) for each in (path, *path.parents)]
        if line.startswith("**/"):
            candidates += path.parts
        if any(fnmatch(each, pattern) for each in candidates):
            ignored = not line.startswith("!")
    return not ignored


class TestCompose:
    @pytest.mark.parametrize("name", SERVICES)
    def test_every_service_is_confined(self, name: str) -> None:
        service = SERVICES[name]

        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

    @pytest.mark.parametrize("name", OURS)
    def test_every_setting_in_the_env_file_reaches_our_services(self, name: str) -> None:
        service = SERVICES[name]
        overridden = {key for key, value in service["environment"].items() if value}

        assert service["env_file"] == [{"path": ".env", "required": False}]
        assert overridden - {"ARBITER_STORE_URL"} == {"ARBITER_HOST", "ARBITER_PORT"}
        assert ("ARBITER_STORE_URL" in overridden) == (name in REPLICAS)

    @pytest.mark.parametrize("name", OURS)
    def test_bad_settings_do_not_restart_our_services_for_ever(self, name: str) -> None:
        assert SERVICES[name]["restart"] == "${RESTART:-on-failure:5}"

    def test_each_of_our_services_has_its_own_volume(self) -> None:
        volumes = [volume for name in OURS for volume in SERVICES[name]["volumes"]]
        sources = {volume.removesuffix(":/data") for volume in volumes}

        assert all(volume.endswith(":/data") for volume in volumes)
        assert len(sources) == len(OURS)
        assert sources <= COMPOSE["volumes"].keys()

    def test_services_wait_until_those_behind_them_are_healthy(self) -> None:
        healthy = {"condition": "service_healthy"}

        assert SERVICES["valkey"]["healthcheck"]["test"] == ["CMD", "valkey-cli", "-e", "ping"]
        for name in REPLICAS:
            assert SERVICES[name]["depends_on"] == {"valkey": healthy}
        assert SERVICES["balancer"]["depends_on"] == dict.fromkeys(REPLICAS, healthy)


class TestImage:
    def test_it_runs_the_console_script_without_privileges(self) -> None:
        last = dict(instructions())
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        user = next(words for name, words in instructions() if name == "USER")

        assert last["ENTRYPOINT"] == ['["arbiter"]']
        assert "arbiter" in project["scripts"]
        assert last["CMD"] == ['["serve"]']
        assert user == ["10001:10001"]

    def test_both_stages_have_a_supported_python(self) -> None:
        bases = {words[0] for name, words in instructions() if name == "FROM"}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

        (base,) = bases
        version = re.fullmatch(r"python:(3\.\d+)-slim", base)
        assert version
        assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone of git")
    def test_the_files_that_it_copies_make_the_wheel(self, tmp_path: Path) -> None:
        context = [name for name in files_of_the_project() if admitted_by_dockerignore(name)]
        sources = [
            source
            for name, words in instructions()
            if name == "COPY" and not words[0].startswith("--from")
            for source in words[:-1]
        ]
        copied = [
            name
            for name in context
            if any(fnmatch(name.partition("/")[0], source) for source in sources)
        ]
        copy(copied, tmp_path / "src")

        assert copied == context
        assert "requirements-dev.lock" not in context
        assert build(tmp_path / "src", tmp_path / "wheels").name.startswith("arbiter_sessions-")


@contextmanager
def name_server(addresses: dict[str, str]) -> Iterator[int]:
    """Run a name server that knows only these IPv4 addresses, and yield its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            query, connection = self.request
            labels, at = [], 12
            while length := query[at]:
                labels.append(query[at + 1 : at + 1 + length].decode())
                at += 1 + length
            question = query[12 : at + 5]
            (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
            address = addresses.get(".".join(labels))
            known = address if kind == A_RECORD else None
            flags = 0x8183 if address is None else 0x8180
            answer = query[:2] + struct.pack("!5H", flags, 1, int(known is not None), 0, 0)
            answer += question
            if known is not None:
                answer += struct.pack("!3HIH", 0xC00C, A_RECORD, 1, 1, 4) + inet_aton(known)
            connection.sendto(answer, self.client_address)

    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is missing: apt-get install haproxy")
def test_a_replica_that_comes_back_with_another_address_is_found(
    start_service: StartService, tmp_path: Path, free_port: int
) -> None:
    assert HAPROXY is not None
    # With a key, since a service without one serves few host names.
    key = {"ARBITER_API_KEYS": f"gate:proxy:{64 * '0'}"}
    first = start_service(ARBITER_HOST="127.0.0.2", **key)
    replica_port = first.url.rpartition(":")[2]
    # The other replica has no address yet.
    addresses = {"replica-one": "127.0.0.2"}
    address = f"http://127.0.0.1:{free_port}"

    def answered() -> bool:
        try:
            return httpx.get(f"{address}/readyz").status_code == 200
        except httpx.ConnectError:
            return False

    with name_server(addresses) as name_server_port:
        config = (ROOT / "deploy/haproxy.cfg").read_text()
        for shipped, ours in {
            "127.0.0.11:53": f"127.0.0.1:{name_server_port}",
            "bind :8080": f"bind 127.0.0.1:{free_port}",
            ":8000": f":{replica_port}",
        }.items():
            assert shipped in config
            config = config.replace(shipped, ours)
        (tmp_path / "haproxy.cfg").write_text(config)
        balancer = subprocess.Popen(
            [HAPROXY, "-db", "-f", tmp_path / "haproxy.cfg"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(answered)
            assert first.stop() == 0
            until(lambda: not answered())
            start_service(ARBITER_HOST="127.0.0.3", ARBITER_PORT=replica_port, **key)
            addresses["replica-one"] = "127.0.0.3"

            until(answered)
        finally:
            balancer.kill()
            balancer.wait(timeout=30)
