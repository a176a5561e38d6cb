"""A stranger with a stopwatch: nothing here knows the gateway from the inside."""
