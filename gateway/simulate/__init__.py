"""`twolane simulate`: replays a day of demand through the gateway's policy, on a virtual clock.

README.md beside this says how to read its results, and lists the modules in reading order.
"""
