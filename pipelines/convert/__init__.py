"""Photos to .beton."""
