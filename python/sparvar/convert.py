"""`python -m sparvar.convert`: upstream's checkpoints into a model folder, as `sparvar convert` does it."""

import sys

from ._convert import convert, main

if __name__ == "__main__":
    sys.exit(main())

# `import sparvar.convert` would put this module where `sparvar.convert(...)` is.
sys.modules[__name__] = convert  # type: ignore[assignment]
