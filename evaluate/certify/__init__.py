"""Checks of a certificate of losslessness, one file each."""
