"""Everything that others may have written: bounded reading of files, folders without links, names shown escaped."""
