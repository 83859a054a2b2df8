"""The paper's system and the command line. Imports nothing, so that `relaylab --help` answers at once."""
