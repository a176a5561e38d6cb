"""HTTP and server-sent events, as they are spoken to engines."""
