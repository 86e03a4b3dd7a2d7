"""Proof by damage: `python -m tests.torture` kills, breaks and floods the real programs.

docs/reliability.md holds what a full run printed. The test suite runs a short layer of the same.
"""
