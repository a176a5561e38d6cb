"""Who decides: plain functions of time and demand."""
