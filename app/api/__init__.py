"""HTTP: bytes in, answers out."""
