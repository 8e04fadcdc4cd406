"""`arbiter` and `python -m app`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

PROGRAM = "python -m app" if __name__ == "__main__" else "arbiter"
"""What the user typed, for the usage lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # SIGHUP would end the process, until the service handles it. Most of the time until then
    # goes into this import.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from app import cli  # noqa: PLC0415

    return cli.run(PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(main())
