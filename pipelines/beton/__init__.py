"""The .beton file: format, reader, writer, side file, check."""
