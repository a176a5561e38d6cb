"""What will fail, before it fails: this machine, its cards and its engines, looked over.

`look` looks and says nothing, `seen` is what it saw, `judge` says what that means and looks at
nothing, `command` is `twolane doctor`. Nothing is changed, loaded or generated.
"""

from gateway.doctor.command import add_command

__all__ = ["add_command"]
