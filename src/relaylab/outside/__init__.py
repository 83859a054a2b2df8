"""Untrusted input and output: bounded reading of files, folders without links, escaped names, errors as one line."""
