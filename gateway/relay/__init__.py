"""How an answer goes out: one exchange, from its slot to its last byte."""
