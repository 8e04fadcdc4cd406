"""The HTTP API of sessions: routes, schemas, encoding, problem codes."""
