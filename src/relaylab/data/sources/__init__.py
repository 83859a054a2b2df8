"""Images on disk, whatever their format: found, listed once, and read by index."""
