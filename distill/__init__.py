"""Training: texts, features of the target, and draft heads trained on both."""
