"""The SQLite backend: sessions in a file."""
