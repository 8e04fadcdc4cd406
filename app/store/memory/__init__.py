"""Sessions in the memory of this process."""
