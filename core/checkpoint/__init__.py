"""Checkpoint and artifact files: headers, tensors, checksums, writers. Builds no model."""
