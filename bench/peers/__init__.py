"""The services to compare with."""
