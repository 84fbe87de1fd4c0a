"""Formats of draft heads that servers read, one file each."""
