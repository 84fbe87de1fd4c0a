"""Checkpoints as transformers models: blocks, packed matrices, loading."""
