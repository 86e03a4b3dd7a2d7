"""How well a model predicts a text, in whose style a text is, and what it copies."""
