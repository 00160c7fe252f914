"""The toolchain's own error: says what went wrong and, in the hint, what to do about it."""

from edge_agent.errors import OutriderError


class ModelError(OutriderError):
    """A model could not be fetched, built, packaged or published."""
