"""The memory backend: sessions in the memory of this process."""
