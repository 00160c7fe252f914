"""What the hub raises on purpose, named by what happens next; each carries a hint that says what to do about it."""


class HubError(Exception):
    """Base of the errors the hub raises on purpose."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Fatal(HubError):
    """The hub cannot start or go on: say why and exit."""


class Refused(HubError):
    """A request is wrong or not allowed; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str, hint: str = "", retry_after_s: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status
        self.retry_after_s = retry_after_s
