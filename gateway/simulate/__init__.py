"""Demand replayed through the policy on a virtual clock, before it is tried on people.

`machine` serves, `traces` asks, `rivals` decide otherwise, `study` compares, `command` is
`twolane simulate`. Nothing here waits, and nothing but files is read.
"""

from gateway.simulate.command import add_command

__all__ = ["add_command"]
