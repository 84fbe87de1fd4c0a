"""Shared parts of trained drafters: base classes, layers, heads directories, conversion."""
