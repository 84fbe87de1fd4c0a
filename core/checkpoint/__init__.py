"""Checkpoints and artifacts as bytes: headers, tensors, writers. Builds no model."""
