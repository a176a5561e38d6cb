"""The real engines, on any machine: no GPU and no model hub needed."""
