"""Decoding with drafters: target, tree, cache, loop, verification rules, drafters."""
