"""The checks: what was observed, what it means, why it matters and what to do.

Nothing here looks at anything: a check is a plain function of the observations.
"""
