"""`twolane doctor`: what fails, and what will, on this machine, its cards and its engines.

`collect` observes and judges nothing, `observations` is what it returns, `checks` judge it and look
at nothing, `command` shows their findings. Nothing is changed, loaded or generated.
"""
