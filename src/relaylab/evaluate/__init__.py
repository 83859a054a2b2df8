"""Trained networks tested as in the paper: protocols, stored class scores, ensembles, intervals."""
