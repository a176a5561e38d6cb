"""The stopwatch proves itself against a server of known times."""
