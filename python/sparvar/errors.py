"""What can go wrong. Every message is one line that says what is wrong, where, and what to do.

All are `sparvar.Error`; `UsageError` and `InputError` are also `ValueError`, `ResourceError` and `Cancelled` also
`RuntimeError`. Ctrl-C is Python's own `KeyboardInterrupt`.
"""

from ._engine import Cancelled, Error, InputError, ResourceError, UsageError

for _kind in (Error, UsageError, InputError, ResourceError, Cancelled):
    _kind.__module__ = "sparvar"

__all__ = ["Cancelled", "Error", "InputError", "ResourceError", "UsageError"]
