"""Who decides that a manifest may be installed.

Invariant: nothing of a manifest is used before `verify` returned it. Trust is asked for new installs only; what is
already installed goes on running when trust has expired.
"""

from __future__ import annotations

from typing import Protocol

from edge_agent.errors import Refused
from edge_agent.wire.bundle import Manifest, SignedManifest, verify_manifest
from edge_agent.wire.errors import WireError
from edge_agent.wire.signing import VerifyKey


class Trust(Protocol):
    """Checks a signature chain."""

    def verify(self, signed: SignedManifest) -> Manifest:
        """The manifest that was signed. Raises Refused."""
        ...


class PinnedHubKey:
    """The hub's key as it was given at enrolment."""

    def __init__(self, key: VerifyKey) -> None:
        self._key = key

    def verify(self, signed: SignedManifest) -> Manifest:
        """Raises Refused: another key, other bytes, or a manifest this version cannot read."""
        try:
            return verify_manifest(self._key, signed)
        except WireError as error:
            hint = f"it must be signed by the key this device enrolled with ({self._key.key_id})"
            raise Refused(f"the manifest is not trusted: {error}", hint) from error
