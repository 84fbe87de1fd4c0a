"""Methods that replace the output matrix."""
