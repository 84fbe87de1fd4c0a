"""Checkpoints as transformers models: architecture, blocks, packed matrices, loading."""
