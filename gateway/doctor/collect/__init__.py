"""The collectors: they read and ask, and change nothing.

What cannot be observed becomes `Unknown`, with the reason: a collector that fails stops no other.
"""
