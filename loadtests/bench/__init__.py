"""What the gateway costs, beside nginx and beside no proxy."""
