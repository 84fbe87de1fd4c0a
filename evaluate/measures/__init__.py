"""The measures of `eval`, one a file."""
