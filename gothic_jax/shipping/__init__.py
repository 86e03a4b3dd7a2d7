"""Models in the forms of other programs, and the proof that they are the same models."""
