"""What does a reader see? Writes the report of an experiment from its raw file."""
