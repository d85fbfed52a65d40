"""Images a second of each part: one file a bench command."""
