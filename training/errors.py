"""The one exception of this package: a line for people, and an exit code."""


class TrainingError(Exception):
    """Says what is wrong, where, and what to do; `code` is the exit code (2: the command line, 1: the rest)."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
