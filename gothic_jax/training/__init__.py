"""A run: from its settings to its last checkpoint."""
