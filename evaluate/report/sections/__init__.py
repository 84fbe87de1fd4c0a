"""Sections of the report, one file each: what it takes from the results, and what it shows.

`make(runs)` returns a `Section`, or None if no result has anything for it. It draws nothing: a
picture is drawn when the page is written.
"""
