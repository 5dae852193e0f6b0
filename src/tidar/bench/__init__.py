"""Decoding methods side by side: speed, tokens per forward, and what the text is worth."""
