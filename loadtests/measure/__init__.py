"""How is load made, and what does each request take? Sends requests and writes the raw file."""
