"""The GPT. No files, no text, no flags."""
