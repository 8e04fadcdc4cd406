"""Sessions in Redis or Valkey, shared by many replicas."""
