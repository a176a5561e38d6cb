"""The real Open WebUI in a real browser, in front of the gateway."""
