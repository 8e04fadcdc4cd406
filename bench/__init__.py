"""The benchmarks behind the documented figures."""
