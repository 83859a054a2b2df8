"""Looks into trained networks."""
