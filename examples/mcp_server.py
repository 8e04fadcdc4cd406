"""An MCP server with three tools, to try out the proxy: python examples/mcp_server.py"""

from __future__ import annotations

from mcp.server.mcpserver import MCPServer

server = MCPServer("notes", log_level="WARNING")

NOTES = {"todo": "buy milk", "done": "write the proxy"}


@server.tool()
def list_notes() -> list[str]:
    """List the names of the notes."""
    return sorted(NOTES)


@server.tool()
def read_note(name: str) -> str:
    """Return the text of a note."""
    return NOTES.get(name, "no such note")


@server.tool()
def delete_note(name: str) -> str:
    """Delete a note for good."""
    return f"deleted {name}" if NOTES.pop(name, None) else "no such note"


if __name__ == "__main__":
    server.run("stdio")
