"""Checkpoints: opened and written."""
