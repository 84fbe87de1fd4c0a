"""Measurements: perplexity, distance from a reference, decoding speed, gates."""
