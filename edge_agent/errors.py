"""Exceptions named by what happens next. Each carries a hint that says what to do about it.

Invariant: whatever leaves a module of `edge_agent` on purpose is one of these, a `wire.errors.WireError`
or an `agent.tool.ToolError`.
"""


class OutriderError(Exception):
    """Base of the errors Outrider raises on purpose."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Retry(OutriderError):
    """It may work later: back off and try again."""


class Refused(OutriderError):
    """It is wrong or not allowed: trying again will not help."""


class Fatal(OutriderError):
    """The process cannot go on: say why and exit."""
