"""Tokens that are not good are refused at the hub and at the device alike; logins, refresh tokens, keys and roles."""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from edge_agent.api.app import create_app
from edge_agent.wire import tokens
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed, public_jwk
from edge_agent.wire.signing import SigningKey, to_text
from hub.auth import Lockout, TokenKeys
from hub.errors import Refused
from tests.api.test_app import Plant
from tests.hub.rig import PASSWORD, Hub, enrolled

Forge = Callable[[SigningKey, float], str]


def signed(key: SigningKey, header: dict[str, Any], claims: dict[str, Any]) -> str:
    text = ".".join(to_text(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{to_text(key.key.sign(text.encode()))}"


def token(key: SigningKey, now: float, head: dict[str, Any] | None = None, **change: Any) -> str:
    """A good token but for what is changed; None takes a claim or a header away."""
    header = {"alg": "Ed25519", "typ": "at+jwt", "kid": key.public.key_id} | (head or {})
    claims = {"iss": "outrider-hub", "sub": "admin", "aud": "outrider", "iat": int(now), "exp": int(now) + 600}
    claims |= {"jti": "j", "roles": ["admin"]} | change
    kept = [{name: value for name, value in part.items() if value is not None} for part in (header, claims)]
    return signed(key, kept[0], kept[1])


def unsigned(key: SigningKey, now: float, alg: str) -> str:
    header = {"alg": alg, "typ": "at+jwt", "kid": key.public.key_id}
    body = token(key, now).split(".")[1]
    return f"{to_text(json.dumps(header).encode())}.{body}."


def keyed(key: SigningKey, now: float, secret: bytes) -> str:
    """HS256 with what is public as the secret."""
    header = {"alg": "HS256", "typ": "at+jwt", "kid": key.public.key_id}
    text = f"{to_text(json.dumps(header).encode())}.{token(key, now).split('.')[1]}"
    return f"{text}.{to_text(hmac.digest(secret, text.encode(), 'sha256'))}"


def swapped(key: SigningKey, now: float) -> str:
    """The signature of one token over the claims of another."""
    viewer, admin = token(key, now, roles=["viewer"]).split("."), token(key, now).split(".")
    return ".".join([viewer[0], admin[1], viewer[2]])


BAD: dict[str, Forge] = {
    "alg none": lambda key, now: unsigned(key, now, "none"),
    "alg None": lambda key, now: unsigned(key, now, "None"),
    "no signature": lambda key, now: unsigned(key, now, "Ed25519"),
    "HS256 with the raw public key": lambda key, now: keyed(key, now, key.public.raw),
    "HS256 with the public key's text": lambda key, now: keyed(key, now, key.public.text.encode()),
    "HS256 with the JWK": lambda key, now: keyed(key, now, json.dumps(public_jwk(key.public)).encode()),
    "alg EdDSA, not the pinned name": lambda key, now: token(key, now, {"alg": "EdDSA"}),
    "another key": lambda key, now: token(SigningKey.generate(), now),
    "another key under our kid": lambda key, now: token(SigningKey.generate(), now, {"kid": key.public.key_id}),
    "its own key in the header": lambda key, now: token(
        (mine := SigningKey.generate()), now, {"jwk": public_jwk(mine.public), "kid": None}
    ),
    "unknown kid": lambda key, now: token(key, now, {"kid": "0" * 16}),
    "no kid": lambda key, now: token(key, now, {"kid": None}),
    "kid a path": lambda key, now: token(key, now, {"kid": "../../dev/null"}),
    "typ JWT": lambda key, now: token(key, now, {"typ": "JWT"}),
    "no typ": lambda key, now: token(key, now, {"typ": None}),
    "a device's type": lambda key, now: token(key, now, {"typ": "device+jwt"}),
    "another aud": lambda key, now: token(key, now, aud="elsewhere"),
    "another device's aud": lambda key, now: token(key, now, aud="outrider/press-2"),
    "another iss": lambda key, now: token(key, now, iss="evil"),
    "past exp": lambda key, now: token(key, now - 3600),
    "exp a text": lambda key, now: token(key, now, exp="9999999999"),
    "iat in the future": lambda key, now: token(key, now + 3600),
    "nbf in the future": lambda key, now: token(key, now, nbf=int(now) + 3600),
    "unknown crit": lambda key, now: token(key, now, {"crit": ["b64"], "b64": False}),
    "roles a text": lambda key, now: token(key, now, roles="admin"),
    "another token's signature": swapped,
    "one bit off": lambda key, now: (good := token(key, now))[:-8] + ("A" if good[-8] != "A" else "B") + good[-7:],
    "not a token": lambda key, now: "a.b.c",
    "a JSON serialisation": lambda key, now: base64.urlsafe_b64encode(b'{"payload":"","signatures":[]}').decode(),
    **{f"no {claim}": lambda key, now, claim=claim: token(key, now, **{claim: None})  # type: ignore[misc]
       for claim in ("iss", "sub", "aud", "exp", "iat", "jti", "roles")},
}  # fmt: skip


def device_api(key: SigningKey, **change: Any) -> httpx.AsyncClient:
    """A device's local API whose grants hold the key."""
    plant, now = Plant(), time.time()
    grants = Grants(1, now - 60, now + 3600, SHIPPED_ROLES, [public_jwk(key.public)])
    plant.known = msgspec.structs.replace(grants, **change)
    transport = httpx.ASGITransport(app=create_app(plant, name="press-1"))
    return httpx.AsyncClient(transport=transport, base_url="http://device")


def shown(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_a_bad_token_is_refused_at_the_hub_and_at_the_device(hub: Hub) -> None:
    key, now = hub.services.auth.keys.now, time.time()
    async with device_api(key) as device:
        good = shown(token(key, now))
        assert (await hub.http.get("/v1/devices", headers=good)).status_code == 200
        assert (await device.get("/v1/status", headers=good)).status_code == 200
        for what, forge in BAD.items():
            bad = shown(forge(key, now))
            for where, path in ((hub.http, "/v1/devices"), (device, "/v1/status")):
                assert (await where.get(path, headers=bad)).status_code == 401, (what, path)


async def test_a_revoked_persons_token_is_refused_at_both(hub: Hub) -> None:
    admin, key = await hub.login(), hub.services.auth.keys.now
    client = await hub.user("operator")
    text = client.headers["Authorization"]
    assert (await admin.delete("/v1/users/some-operator")).status_code == 204
    revoked = hub.services.auth.grants.revoked
    async with device_api(key, revoked=revoked) as device:
        for where, path in ((hub.http, "/v1/devices"), (device, "/v1/status")):
            assert (await where.get(path, headers={"Authorization": text})).status_code == 403


async def test_past_hard_expiry_a_device_still_shows_and_does_nothing_more(hub: Hub) -> None:
    key, now = hub.services.auth.keys.now, time.time()
    async with device_api(key, hard_expiry=now - 1) as device:
        assert (await device.get("/v1/status", headers=shown(token(key, now)))).status_code == 200
        refused = await device.post("/v1/tasks", json={"text": "stop line 2"}, headers=shown(token(key, now)))
        assert refused.status_code == 403


async def test_a_clock_years_off_takes_no_trust_and_gives_none(hub: Hub) -> None:
    key, now = hub.services.auth.keys.now, time.time()
    year = 365 * 86400
    grants = Grants(1, now - 60, now + 3600, SHIPPED_ROLES, [public_jwk(key.public)])
    ann = Subject("ann", ["operator"], now)
    assert allowed(grants, ann, "call:tool", now=now - 20 * year), "set back: as if it were when the grants were issued"
    assert not allowed(grants, ann, "call:tool", now=now + 20 * year)
    assert allowed(grants, ann, "call:tool", now=now), "stepped forward and back again: nothing stays expired"
    plant = Plant()
    plant.known = grants
    for clock, status in ((now - 20 * year, 200), (now + 20 * year, 401), (now, 200)):
        transport = httpx.ASGITransport(app=create_app(plant, clock=lambda clock=clock: clock, name="press-1"))
        async with httpx.AsyncClient(transport=transport, base_url="http://device") as device:
            answer = await device.get("/v1/status", headers=shown(token(key, now)))
            assert answer.status_code == status, clock
    old = token(key, now - 7200)
    with pytest.raises(tokens.BadSignature):  # one that had run out before the floor is not made young by the clock
        tokens.verify_access_token(grants.jwks, old, now=now - 20 * year, floor=grants.issued_at)


async def test_an_offline_token_is_good_on_its_device_alone_and_no_longer_than_the_grants(hub: Hub) -> None:
    await enrolled(hub, "press-1")
    operator, viewer = await hub.user("operator"), await hub.user("viewer")
    made = (await operator.post("/v1/devices/press-1/offline-token", json={"ttl_s": 1e9})).json()
    assert made["expires"] == hub.services.auth.grants.hard_expiry
    assert (await viewer.post("/v1/devices/press-1/offline-token", json={})).status_code == 403
    assert (await operator.post("/v1/devices/press-9/offline-token", json={})).status_code == 404
    bearer = shown(made["access_token"])
    async with device_api(hub.services.auth.keys.now) as device:
        assert (await device.get("/v1/status", headers=bearer)).status_code == 200
    assert (await hub.http.get("/v1/devices", headers=bearer)).status_code == 401


async def test_a_refresh_token_is_good_once_and_its_reuse_ends_the_whole_login(hub: Hub) -> None:
    login = {"user": "admin", "password": PASSWORD}

    async def refresh(text: str) -> httpx.Response:
        return await hub.http.post("/v1/token", json={"refresh_token": text})

    one, other = [(await hub.http.post("/v1/login", json=login)).json()["refresh_token"] for _ in range(2)]
    following = (await refresh(one)).json()
    assert (await hub.client(following["access_token"]).get("/v1/users")).status_code == 200
    assert (await refresh(one)).status_code == 401
    assert (await refresh(following["refresh_token"])).status_code == 401, "the thief's or the owner's, both end"
    assert (await refresh(other)).status_code == 200, "another login goes on"
    assert (await refresh("rubbish")).status_code == 401
    entries = await hub.services.audit.newest()
    assert [e["actor"] for e in entries if e["action"] == "reuse:refresh-token"] == ["admin"]


async def test_a_revoked_person_gets_nothing_for_a_refresh_token(hub: Hub) -> None:
    admin = await hub.login()
    await hub.services.auth.add_user("ann", ["viewer"], PASSWORD, by="test")
    kept = (await hub.http.post("/v1/login", json={"user": "ann", "password": PASSWORD})).json()["refresh_token"]
    await admin.delete("/v1/users/ann")
    assert (await hub.http.post("/v1/token", json={"refresh_token": kept})).status_code == 401


async def test_who_is_revoked_in_the_middle_of_it_gets_no_token_either(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth, loop = hub.services.auth, asyncio.get_running_loop()
    await auth.add_user("ann", ["operator"], PASSWORD, by="test")
    token, _ = await auth.login("ann", PASSWORD, "here")
    ann = auth.subject(token)

    def revoked_while_hashing(hashed: str, password: str) -> bool:
        asyncio.run_coroutine_threadsafe(auth.revoke("ann", by="admin"), loop).result(20)
        return True

    monkeypatch.setattr("hub.auth._password_matches", revoked_while_hashing)
    with pytest.raises(Refused) as login:
        await auth.login("ann", PASSWORD, "here")
    with pytest.raises(Refused) as offline:
        await auth.offline_token(ann, "press-1", 7 * 86400)
    assert (login.value.status, offline.value.status) == (401, 401)


async def test_a_name_guessed_at_from_everywhere_is_locked_known_or_not(hub: Hub) -> None:
    auth = hub.services.auth
    answers = {}
    for name in ("admin", "nobody"):
        for n in range(Lockout.FREE + 1):
            try:
                await auth.login(name, "wrong", f"client-{n}")
            except Exception as error:  # noqa: BLE001 - which one is compared
                answers.setdefault(name, []).append(str(error))
    assert answers["admin"] == answers["nobody"]
    assert "too many failed logins" in answers["admin"][-1]
    with pytest.raises(Exception, match="too many"):
        await auth.login("admin", PASSWORD, "the owner")
    locked = [e for e in await hub.services.audit.newest() if e["action"] == "lock:user"]
    assert sorted(e["actor"] for e in locked) == ["admin", "nobody"]


async def test_devices_know_the_next_key_before_it_signs_and_the_last_one_after(hub: Hub) -> None:
    admin = await hub.login()
    before = hub.services.auth.grants  # what a device that is cut off has
    old = admin.headers["Authorization"].removeprefix("Bearer ")
    assert (await admin.post("/v1/keys/rotate")).status_code == 204
    new = (await hub.login()).headers["Authorization"].removeprefix("Bearer ")
    assert tokens.verify_access_token(before.jwks, new, now=time.time()).name == "admin"
    assert tokens.verify_access_token(hub.services.auth.grants.jwks, old, now=time.time()).name == "admin"
    shown = (await hub.http.get("/v1/jwks")).json()["keys"]
    assert [key["kid"] for key in shown[:2]] == [
        hub.services.auth.keys.now.public.key_id, hub.services.auth.keys.next.public.key_id
    ]  # fmt: skip
    assert all("d" not in key for key in shown)


def test_a_rotation_cut_in_the_middle_signs_with_the_key_that_is_known(tmp_path: Path) -> None:
    keys = TokenKeys(tmp_path)
    known = keys.next.public.text
    (tmp_path / "now.key").rename(tmp_path / "last.key")
    assert TokenKeys(tmp_path).now.public.text == known
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


async def test_a_custom_role_may_do_what_it_says_and_is_gone_when_removed(hub: Hub) -> None:
    admin = await hub.login()
    assert (await admin.put("/v1/roles/fitter", json={"permissions": ["read:device"]})).status_code == 204
    fitter = await hub.user("fitter")
    assert (await fitter.get("/v1/devices")).status_code == 200
    assert (await fitter.get("/v1/audit")).status_code == 403
    assert (await admin.put("/v1/roles/fitter", json={"permissions": ["read:audit"]})).status_code == 204
    assert (await fitter.get("/v1/devices")).status_code == 403, "at once, without a new login"
    assert (await admin.delete("/v1/roles/fitter")).status_code == 204
    assert (await fitter.get("/v1/audit")).status_code == 403
    for name, permissions, status in (
        ("admin", ["read:*"], 409), ("Bad Name", ["read:*"], 422), ("x", ["everything"], 422), ("x", ["a:b:"], 422)
    ):  # fmt: skip
        assert (await admin.put(f"/v1/roles/{name}", json={"permissions": permissions})).status_code == status
    assert (await admin.delete("/v1/roles/fitter")).status_code == 404
