"""The dashboard and the alerts query only metrics and labels that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.services import ROOT, Service, running
from tests.support import session_request

DEPLOY = ROOT / "deploy"
OURS = re.compile(r"\b(arbiter_\w+)(?:\{([^}]*)\})?")
SAMPLE = re.compile(r"^(arbiter_\w+)(?:\{(.*)\})? \S+$", re.MULTILINE)
OF_PROMETHEUS = {"job", "instance"}
MUST_SHOW = {
    "admissions and denials": "arbiter_decisions_total",
    "latency": "arbiter_http_request_duration_seconds_bucket",
    "sessions": "arbiter_sessions_active",
    "sweeps": "arbiter_sweep_duration_seconds_count",
    "store health": "arbiter_store_up",
    "event-loop lag": "arbiter_event_loop_lag_seconds_bucket",
    "load": "arbiter_http_refused_total",
    "audit": "arbiter_audit_dropped_total",
}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/arbiter.json").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


EXPRESSIONS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in dashboard()["panels"]
    for target in panel["targets"]
} | {rule["alert"]: rule["expr"] for rule in alerts()}


def label_names(text: str | None) -> set[str]:
    return set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", text or ""))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = f"sqlite://{tmp_path_factory.mktemp('store')}/sessions.db"
    with running(ARBITER_CLEANUP_INTERVAL_SECS="0.1", ARBITER_STORE_URL=store) as started:
        yield started


@pytest.fixture(scope="module")
def exported(service: Service) -> dict[str, set[str]]:
    """The metrics of a service that has done a little of everything, with their labels."""
    path = httpx.post(f"{service.url}/sessions", json=session_request()).headers["location"]
    for tool in ("read_file", "rm"):
        httpx.post(f"{service.url}{path}/calls", json={"tool_name": tool})
    service.exchange(b"what\r\n\r\n")
    text = httpx.get(f"{service.url}/metrics").text
    return {name: label_names(labels) for name, labels in SAMPLE.findall(text)}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_queried_metrics_and_labels_are_exported(
    exported: dict[str, set[str]], expression: str
) -> None:
    asked = OURS.findall(expression)

    assert asked or expression.startswith("up{")
    assert expression.count("(") == expression.count(")")
    for name, labels in asked:
        assert name in exported
        assert label_names(labels) <= exported[name] | OF_PROMETHEUS
    names = [name for name, _ in asked]
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        known = set.union(OF_PROMETHEUS, *(exported[name] for name in names))
        assert {label.strip() for label in labels.split(",")} <= known


@pytest.mark.parametrize("metric", MUST_SHOW.values(), ids=MUST_SHOW)
def test_the_dashboard_shows_the_metric(metric: str) -> None:
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]

    assert any(metric.removesuffix("_count") in expression for expression in shown)


def test_every_metric_is_used(exported: dict[str, set[str]]) -> None:
    used = " ".join(EXPRESSIONS.values())
    families = {re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in exported}

    # The version is not plotted; the dashboard finds its jobs by it.
    assert {name for name in families if name not in used} == {"arbiter_build_info"}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["description"].strip().endswith((".", "sessions."))


def test_panels_do_not_overlap_and_share_one_source() -> None:
    panels = dashboard()["panels"]
    places = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in panels]
    source = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]

    assert len(set(places)) == len(panels)
    assert {each["datasource"]["uid"] for each in panels} == {source["uid"]}


def test_every_service_in_the_compose_file_is_hardened() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_files_mounted_by_the_compose_file_exist() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounted = [
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if volume.startswith("./")
    ]

    assert mounted
    for path in mounted:
        assert (ROOT / path).exists(), path
