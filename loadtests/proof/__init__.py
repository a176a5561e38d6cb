"""Can the stopwatch be trusted? Checks it against known times and against other tools."""
