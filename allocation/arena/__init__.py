"""Trying allocators out without a model: recorded and synthetic worlds, and what is measured on them."""
