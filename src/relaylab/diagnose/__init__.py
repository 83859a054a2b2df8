"""Diagnosis of trained networks."""
