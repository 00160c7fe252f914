"""Who may do what, as the hub signed it: the same function answers at the hub and on a device with no network.

Invariants: deny by default; a lower epoch is refused; what a revoked subject got before the time of revocation is
void; past `hard_expiry` only permissions to read remain; it is never earlier than the grants were issued. The envelope
is a compact JWS (RFC 7515, RFC 9864).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import msgspec
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from edge_agent.wire.errors import BadSignature, Undecodable, VersionRefused
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import VERSION

ALGORITHM = "Ed25519"
_TYPE = "outrider-grants"

SHIPPED_ROLES: dict[str, list[str]] = {
    "admin": ["*:*"],
    "developer": [
        "read:*",
        "call:tool",
        "run:task",
        "run:model",
        "publish:bundle",
        "assign:bundle",
        "configure:device",
        "manage:rollout",
        "create:offline-token",
        "upload:blob",
    ],
    "operator": [
        "call:tool",
        "create:offline-token",
        "run:task",
        "run:model",
        "upload:blob",
        *(f"read:{noun}" for noun in ("tool", "task", "device", "job", "telemetry", "bundle", "rollout", "grants")),
    ],
    "auditor": ["read:*"],
    "viewer": [f"read:{noun}" for noun in ("device", "job", "task", "telemetry", "bundle", "rollout", "grants")],
}


class Grants(msgspec.Struct, frozen=True):
    """Roles and their permissions `verb:noun[:scope]`, the hub's keys now and next, and who was revoked when.

    `groups` has the devices of each group that a scope names.
    """

    epoch: int
    issued_at: float
    hard_expiry: float
    roles: dict[str, list[str]]
    jwks: list[dict[str, str]]
    revoked: dict[str, float] = {}
    v: int = VERSION
    groups: dict[str, list[str]] | msgspec.UnsetType = msgspec.UNSET


class Subject(msgspec.Struct, frozen=True):
    """Who asks: a name, the roles the token carries, and when it was issued (seconds since the Unix epoch)."""

    name: str
    roles: list[str]
    issued_at: float


def public_jwk(key: VerifyKey) -> dict[str, str]:
    """The key as a JWK (RFC 8037) with its id."""
    jwk = OKPKey.import_key(key.key).as_dict(private=False)
    return {name: str(value) for name, value in jwk.items()} | {"kid": key.key_id}


def sign_grants(key: SigningKey, grants: Grants) -> str:
    """A compact JWS."""
    header = {"alg": ALGORITHM, "typ": _TYPE, "kid": key.public.key_id}
    return jws.serialize_compact(header, msgspec.json.encode(grants), OKPKey.import_key(key.key), [ALGORITHM])


def verify_grants(key: VerifyKey, text: str, known_epoch: int = 0) -> Grants:
    """Raises BadSignature, VersionRefused, or Undecodable (also for an epoch below `known_epoch`)."""
    try:
        signed = jws.deserialize_compact(text, OKPKey.import_key(key.key), [ALGORITHM])
    except (JoseError, ValueError, TypeError) as error:  # TypeError: a `crit` that is no list of names
        raise BadSignature(f"the grants are not signed by key {key.key_id}: {error}") from None
    if signed.headers().get("typ") != _TYPE:
        raise BadSignature(f"a signed {signed.headers().get('typ')!r} is not grants")
    try:
        grants = msgspec.json.decode(signed.payload or b"", type=Grants)
    except msgspec.DecodeError as error:
        raise Undecodable(f"not grants: {error}") from None
    if grants.v != VERSION:
        raise VersionRefused(f"grants of protocol version {grants.v}; this side speaks version {VERSION}")
    if grants.epoch < known_epoch:
        raise Undecodable(f"grants of epoch {grants.epoch} are older than the known {known_epoch}")
    return grants


def allowed(grants: Grants, subject: Subject, action: str, resource: str = "", *, now: float, device: str = "") -> bool:
    """May the subject do `verb:noun` to the resource on the device at `now`? No unless a permission says so.

    A scope is a pattern for the resource (for the device, where none is named), or such conditions as
    `group=line-2&tool=set_*`, of `device`, `group`, `tool` and `model`, which must all hold.
    When the grants were issued is signed, so a clock that stands before that is wrong and is not believed.
    """
    now = max(now, grants.issued_at)
    if subject.issued_at <= grants.revoked.get(subject.name, float("-inf")):
        return False
    verb, _, noun = action.partition(":")
    expired = now >= grants.hard_expiry
    if expired and verb != "read":
        return False
    for role in subject.roles:
        for permission in grants.roles.get(role, []):
            p_verb, _, rest = permission.partition(":")
            p_noun, _, scope = rest.partition(":")
            if p_verb in (verb, "*") and p_noun in (noun, "*") and _within(scope, grants, noun, resource, device):
                return True
    return False


def _within(scope: str, grants: Grants, noun: str, resource: str, device: str) -> bool:
    for condition in scope.split("&") if scope else ():
        kind, named, pattern = condition.rpartition("=")
        groups = grants.groups or {}
        match kind:
            case "" if not named:
                holds = fnmatchcase(resource or device, pattern)
            case "device":
                holds = bool(device) and fnmatchcase(device, pattern)
            case "group":
                holds = device in groups.get(pattern, ())
            case "tool" | "model":
                holds = noun == kind and fnmatchcase(resource, pattern)
            case _:
                holds = False
        if not holds:
            return False
    return True


def groups_named(roles: dict[str, list[str]]) -> set[str]:
    """The groups that some scope names."""
    scopes = (permission.split(":", 2)[2:] for given in roles.values() for permission in given)
    return {part[6:] for scope in scopes for whole in scope for part in whole.split("&") if part.startswith("group=")}
