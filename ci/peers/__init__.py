"""Benchmarks against what users would take instead."""
