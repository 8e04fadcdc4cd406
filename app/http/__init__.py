"""HTTP as this service speaks it. Nothing here knows about sessions."""
