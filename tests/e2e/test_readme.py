"""The README's tour, typed as it stands, prints what the README shows."""

from __future__ import annotations

import re
import subprocess

from tests.services import ROOT, StartService

CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VOLATILE = [
    (re.compile(r"\b(?!7c9e6679)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "ID"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"), "INSTANT"),
    (re.compile(r"\b[0-9a-f]{12}-[0-9a-f]+\b"), "REQUEST"),
    (re.compile(r"^date: .*$", re.MULTILINE), "date: DATE"),
]


def settled(text: str) -> list[str]:
    """The lines of `text` with everything that differs from run to run made equal."""
    for pattern, name in VOLATILE:
        text = pattern.sub(name, text.replace("\r", ""))
    return text.split("\n")


def test_the_tour_prints_what_it_shows(start_service: StartService) -> None:
    service = start_service()
    shown = "".join(
        re.findall(
            r"^```console\n(.*?)^```$",
            (ROOT / "README.md").read_text(),
            re.MULTILINE | re.DOTALL,
        )
    )
    commands = re.findall(r"^\$ (.*)$", shown, re.MULTILINE)
    script = "\n".join(f"echo '$' {number}\n{each}" for number, each in enumerate(commands))

    typed = subprocess.run(
        ["bash", "-c", script.replace("localhost:8000", service.url.removeprefix("http://"))],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    ).stdout

    numbers = iter(range(len(commands)))
    expected = re.sub(r"^\$ .*$", lambda _: f"$ {next(numbers)}", shown, flags=re.MULTILINE)
    # curl ends a body without a line break, where a terminal shows the next prompt.
    printed = re.sub(r"(?<=[}])\$ ", "\n$ ", typed).rstrip("\n")
    assert len(commands) >= 7
    assert settled(printed) == settled(expected.rstrip("\n"))


def test_every_test_that_a_promise_names_is_there() -> None:
    table = re.findall(r"^\| .* \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(?:tests/\S+/)?(test_\w+|Test\w+)", "\n".join(table)))
    files = list((ROOT / "tests").rglob("test_*.py"))
    written = {
        name
        for file in files
        for name in re.findall(
            r"^ *(?:async )?(?:def|class) (\w+)", file.read_text(), re.MULTILINE
        )
    } | {file.stem for file in files}

    assert len(named) > 15
    assert named - written == set()
