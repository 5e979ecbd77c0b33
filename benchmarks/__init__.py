"""The benchmarks of `fsm_storage` beside its peers: `python -m benchmarks`. Nothing here is published."""
