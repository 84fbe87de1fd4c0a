"""Objectives: what a training changes, by which loss, and what it writes; one file each."""
