"""The report: one HTML page of what commands printed with `--json`. Imports no torch."""
