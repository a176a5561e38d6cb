"""What is seen of it: metrics, cost, the request log, status."""
