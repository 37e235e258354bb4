"""Benchmarks: one script for each question."""
