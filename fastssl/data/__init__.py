"""What --data takes: a file, a folder, an archive, the sample set."""
