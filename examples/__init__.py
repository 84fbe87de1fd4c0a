"""Example scripts, and the bundled checkpoint made by one of them."""
