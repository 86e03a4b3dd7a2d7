"""Texts: fetched, cleaned, tokenized, cut into windows."""
