"""What the contract refuses, named by what the receiver does next."""


class WireError(Exception):
    """Base of everything the contract refuses."""


class BadSignature(WireError):
    """The signature does not cover what came: audit it, change nothing."""


class Undecodable(WireError):
    """Signed, but not readable: set it aside, go on."""


class TooBig(Undecodable):
    """Larger than the contract allows, packed or unpacked."""


class VersionRefused(WireError):
    """Another major version of the protocol speaks: its name is in the text."""
