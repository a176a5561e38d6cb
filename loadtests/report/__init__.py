"""From raw requests to figures, charts and a report."""
