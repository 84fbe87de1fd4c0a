"""Targets: the models whose text is wanted, run by mask and cache or by a recurrent state."""
