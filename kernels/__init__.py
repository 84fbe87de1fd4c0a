"""Bit packing and matrix products with few rows: plain tensors, no models."""
