"""Policies of draft size: measured costs, tuned trees, chains."""
