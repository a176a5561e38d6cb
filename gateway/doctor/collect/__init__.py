"""The collectors: they read and ask, and change nothing.

What cannot be read is `Unknown`, with the reason, and no error.
"""
