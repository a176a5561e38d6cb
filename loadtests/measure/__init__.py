"""Load and time: what is sent, and what each request took."""
