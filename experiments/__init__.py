"""The first check of docs/evidence/first-check.md: its recipes, and the tables and figures drawn from its results.

python -m experiments.page    # redraw the tables of docs/evidence/first-check.md and the figures of results/
"""
