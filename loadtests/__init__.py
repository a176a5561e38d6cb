"""Measures engines and gateways from outside, by URL and OpenAI's API; see README.md."""
