"""HTTP as this service speaks it; knows nothing about sessions."""
