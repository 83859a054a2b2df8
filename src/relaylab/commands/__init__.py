"""The front door: a file for each group of commands, with their options, what they compose, and what they print."""
