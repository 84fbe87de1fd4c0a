"""Drafters, one file each: they propose tokens, the target decides."""
