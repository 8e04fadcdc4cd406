"""Arbiter: issues and enforces task sessions for AI agents, over HTTP."""

__version__ = "0.1.0"
