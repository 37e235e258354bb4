"""Allocation methods, a module for each family; `allocation.allocators` knows them by name."""
