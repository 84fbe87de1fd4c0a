"""Audits: what compression changed besides perplexity, and what a checkpoint's outputs give away.

One file an audit: `trust.py`, `logprobs.py`, `features.py`.
"""
