"""Texts, prompts and conversations out of files."""
