"""What is seen of the gateway: metrics, cost, the request log, status."""
