"""Recipes: YAML to checked, frozen dataclasses."""
