"""The engines: what they have in common, and where they differ."""
