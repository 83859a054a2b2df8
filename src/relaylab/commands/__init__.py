"""The commands: one file for each group, with its options and its output."""
