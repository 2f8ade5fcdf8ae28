"""Benchmarks: ``python -m bench``, or ``pytest bench/attention.py``. Not part of the wheel."""
