"""The recipes that install with the package: one yaml file for each published row."""
