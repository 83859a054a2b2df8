"""The second check: its recipe files, networks and commands; see docs/evidence/second-check.md."""
