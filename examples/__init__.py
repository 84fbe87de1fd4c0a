"""Scripts that a user runs, and the bundled checkpoint that one of them made."""
