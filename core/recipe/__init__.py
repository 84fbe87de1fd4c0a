"""Recipes: several commands as one resumable run, their options in one YAML file."""
