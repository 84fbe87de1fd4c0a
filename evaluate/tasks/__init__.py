"""Tasks by lm-evaluation-harness: scoring, answers kept in a file, tasks of local data."""
