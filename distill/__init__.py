"""Teaching: training text, and what learns from it."""
