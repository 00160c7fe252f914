"""The toolchain's own error: says what went wrong and, in the hint, what to do about it."""


class ModelError(Exception):
    """A model could not be fetched, built, packaged or published."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
