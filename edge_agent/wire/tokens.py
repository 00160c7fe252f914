"""The tokens people and devices show (JWT, RFC 7519; access tokens, RFC 9068), Ed25519 only.

Invariants: algorithm and `typ` are pinned; `iss sub aud exp iat jti` are all required; an access token says its
roles and is worth what the grants say those roles are worth.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey
from joserfc.jws import extract_compact

from edge_agent.wire.errors import BadSignature
from edge_agent.wire.grants import ALGORITHM, Subject
from edge_agent.wire.signing import SigningKey, VerifyKey

ISSUER = "outrider-hub"
AUDIENCE = "outrider"
LEEWAY_S = 60
_REQUIRED = ("iss", "sub", "aud", "exp", "iat", "jti")


def issue_access_token(
    key: SigningKey, subject: str, roles: list[str], *, now: float, lifetime_s: float, audience: str = AUDIENCE
) -> str:
    """An `at+jwt` for a person."""
    return _issue(key, "at+jwt", ISSUER, subject, audience, now, lifetime_s, {"roles": roles})


def verify_access_token(
    jwks: list[dict[str, str]],
    token: str,
    *,
    now: float,
    device: str = "",
    floor: float = float("-inf"),
) -> Subject:
    """Who shows it. Raises BadSignature with the reason.

    On a `device` its offline tokens are good too. `floor` is a time the hub signed: a clock that stands before it is
    wrong, and then the token's own signed `iat` is the better witness.
    """
    try:
        keys = KeySet([OKPKey.import_key(dict(jwk)) for jwk in jwks])
    except (JoseError, ValueError) as error:
        raise BadSignature(f"the hub's keys cannot be read: {error}") from None
    audiences = [AUDIENCE, f"{AUDIENCE}/{device}"] if device else [AUDIENCE]
    claims = _verify(keys, token, "at+jwt", ISSUER, audiences, now, floor)
    roles = claims.get("roles")
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise BadSignature("the token has no roles")
    return Subject(str(claims["sub"]), roles, float(claims["iat"]))


def issue_device_token(key: SigningKey, fleet: str, device: str, *, now: float, lifetime_s: float = 300) -> str:
    """A `device+jwt` for a device's own requests to the hub."""
    return _issue(key, "device+jwt", device, device, fleet, now, lifetime_s, {})


def device_of(token: str) -> str:
    """The device a token says it is, unverified: to look up the key to verify it with. Raises BadSignature."""
    try:
        return str(msgspec.json.decode(extract_compact(token.encode()).payload)["sub"])
    except (JoseError, ValueError, KeyError, TypeError):
        raise BadSignature("not a device token") from None


def verify_device_token(key: VerifyKey, token: str, *, fleet: str, device: str, now: float) -> None:
    """Raises BadSignature with the reason."""
    claims = _verify(OKPKey.import_key(key.key), token, "device+jwt", device, [fleet], now)
    if claims["sub"] != device:
        raise BadSignature(f"the token is for {claims['sub']}, not {device}")


def _issue(
    key: SigningKey, typ: str, iss: str, sub: str, aud: str, now: float, lifetime_s: float, more: dict[str, Any]
) -> str:
    header = {"alg": ALGORITHM, "typ": typ, "kid": key.public.key_id}
    times = {"iat": int(now), "exp": int(now + lifetime_s)}
    claims = {"iss": iss, "sub": sub, "aud": aud, **times, "jti": secrets.token_urlsafe(12), **more}
    return jwt.encode(header, claims, OKPKey.import_key(key.key), algorithms=[ALGORITHM])


def _verify(
    key: OKPKey | KeySet, token: str, typ: str, iss: str, aud: list[str], now: float, floor: float = float("-inf")
) -> dict[str, Any]:
    try:
        decoded = jwt.decode(token, key, algorithms=[ALGORITHM])
        if decoded.header.get("typ") != typ:
            raise BadSignature(f"a token of type {decoded.header.get('typ')!r}; this needs {typ!r}")
        if isinstance(key, KeySet) and "kid" not in decoded.header:
            raise BadSignature("the token does not say which key signed it")
        rules: dict[str, Any] = {name: {"essential": True} for name in _REQUIRED}
        rules |= {"iss": {"essential": True, "value": iss}, "aud": {"essential": True, "values": aud}}
        if now < floor:
            issued = decoded.claims.get("iat")
            now = max(floor, issued) if isinstance(issued, int | float) else floor
        jwt.JWTClaimsRegistry(now=int(now), leeway=LEEWAY_S, **rules).validate(decoded.claims)
    except (JoseError, ValueError, TypeError) as error:  # TypeError: a `crit` that is no list of names
        raise BadSignature(f"the token is refused: {error}") from None
    return decoded.claims
