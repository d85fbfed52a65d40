"""Self-supervised methods. A method knows networks, heads and losses; it knows no files and no command line."""
