"""`twolane compare` and `twolane calibrate`: the configured lanes, measured."""
