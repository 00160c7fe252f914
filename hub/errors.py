"""What the hub raises on purpose, named by what happens next; each carries a hint that says what to do about it."""

from edge_agent.errors import OutriderError


class HubError(OutriderError):
    """Base of the errors the hub raises on purpose."""


class Fatal(HubError):
    """The hub cannot start or go on: say why and exit."""


class Refused(HubError):
    """A request is wrong or not allowed; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str, hint: str = "", retry_after_s: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status
        self.retry_after_s = retry_after_s
