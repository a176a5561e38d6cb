"""How a request comes in: the ASGI edge, the pages, keys."""
