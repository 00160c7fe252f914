"""Nobody gets past a route without a token and the right, and guessing passwords is slow."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter

from edge_agent.wire import tokens
from edge_agent.wire.grants import SHIPPED_ROLES, Subject, allowed, verify_grants
from edge_agent.wire.signing import SigningKey, VerifyKey
from hub.api.guard import OPEN, declare_actions
from hub.auth import Backoff
from hub.errors import Fatal
from tests.hub.rig import PASSWORD, Hub, enrolled, running

BODIES: dict[str, Any] = {
    "/v1/enrolments": {"ttl_s": 60},
    "/v1/users": {"name": "new", "password": PASSWORD, "roles": ["viewer"]},
    "/v1/devices/{device}/tasks": {"text": "stop line 2"},
    "/v1/devices/{device}/jobs": {"kind": "tool", "body": {"tool": "stop_line", "args": {}}},
    "/v1/devices/{device}/bundles": {"name": "m", "version": "1"},
    "/v1/bundles": {"manifest": {}},
    "/v1/devices/{device}/certificate": {"csr": "rubbish"},
    "/v1/devices/{device}/offline-token": {},
    "/v1/roles/{role}": {"permissions": ["read:device"]},
}


async def routes(hub: Hub) -> list[tuple[str, str, str | None]]:
    """Method, path and declared action of everything in the OpenAPI."""
    paths = (await hub.http.get("/openapi.json")).json()["paths"]
    return [
        (method.upper(), path, operation.get("x-action"))
        for path, operations in paths.items()
        for method, operation in operations.items()
    ]


async def call(client: Any, method: str, path: str) -> int:
    answer = await client.request(method, re.sub(r"\{\w+\}", "x", path), json=BODIES.get(path))
    code: int = answer.status_code
    return code


async def test_every_route_refuses_strangers_and_declares_its_action(hub: Hub) -> None:
    seen = await routes(hub)
    assert len(seen) > 20
    for method, path, action in seen:
        if path in OPEN or not path.startswith("/v1/"):
            continue
        assert action, f"{method} {path} declares no action"
        assert await call(hub.http, method, path) == 401, (method, path)
        assert await call(hub.client("rubbish"), method, path) == 401, (method, path)


@pytest.mark.parametrize("role", [*SHIPPED_ROLES, "nobody"])
async def test_every_role_may_do_what_the_grants_say_and_no_more(hub: Hub, role: str) -> None:
    roles = [role] if role in SHIPPED_ROLES else []
    token = tokens.issue_access_token(hub.services.auth.keys.now, "somebody", roles, now=time.time(), lifetime_s=60)
    client, subject = hub.client(token), Subject("somebody", roles, time.time())
    for method, path, action in await routes(hub):
        if action:
            may = allowed(hub.services.auth.grants, subject, action, now=time.time())
            assert (await call(client, method, path) == 403) is not may, (role, method, path)


async def test_a_token_of_another_key_type_or_age_is_refused(hub: Hub) -> None:
    now, key = time.time(), hub.services.auth.keys.now
    for token in (
        tokens.issue_access_token(SigningKey.generate(), "admin", ["admin"], now=now, lifetime_s=60),
        tokens.issue_access_token(key, "admin", ["admin"], now=now - 7200, lifetime_s=60),
        tokens.issue_access_token(key, "admin", ["admin"], now=now, lifetime_s=60, audience="elsewhere"),
        tokens.issue_device_token(key, "main", "admin", now=now),
    ):
        answer = await hub.client(token).get("/v1/devices")
        assert answer.status_code == 401
        assert answer.json()["hint"]


async def test_a_devices_own_token_opens_blobs_bundles_uploads_models_and_grants_only(hub: Hub) -> None:
    device = await enrolled(hub, "press-1")
    client = hub.client(tokens.issue_device_token(device.key, "main", "press-1", now=time.time()))
    forged = hub.client(tokens.issue_device_token(SigningKey.generate(), "main", "press-1", now=time.time()))
    for method, path, action in await routes(hub):
        if action:
            own = path == "/v1/devices/{device}/certificate" or path.startswith(
                ("/v1/uploads", "/v1/chat", "/v1/models")
            )
            shared = ("/v1/grants", "/v1/blobs/{sha256}", "/v1/trust", "/v1/trust/{file}")
            opens = own or (method in ("GET", "HEAD") and path in shared)
            assert (await call(client, method, path) != 401) is opens, (method, path)
            assert await call(forged, method, path) == 401


async def test_a_revoked_persons_old_token_is_void_and_the_grants_say_so(hub: Hub) -> None:
    admin, operator = await hub.login(), await hub.user("operator")
    assert (await operator.get("/v1/devices")).status_code == 200
    before = hub.services.auth.grants.epoch
    assert (await admin.delete("/v1/users/some-operator")).status_code == 204
    assert (await operator.get("/v1/devices")).status_code == 403
    again = await hub.http.post("/v1/login", json={"user": "some-operator", "password": PASSWORD})
    assert again.status_code == 401
    text = (await admin.get("/v1/grants")).text
    grants = verify_grants(VerifyKey.from_text(hub.services.key.public.text), text, known_epoch=before)
    assert grants.epoch == before + 1
    assert "some-operator" in grants.revoked


async def test_the_first_admin_is_made_once_and_the_password_shown_once(tmp_path: Path) -> None:
    shown: list[str] = []
    for _ in range(2):
        async with running(tmp_path, admin_password=None, on_generated_password=shown.append) as hub:
            await hub.login(password=shown[0])
            epoch = hub.services.auth.grants.epoch
    assert len(shown) == 1
    assert epoch == 2
    assert (tmp_path / "hub.key").stat().st_mode & 0o077 == 0


async def test_wrong_passwords_are_slowed_and_say_nothing_about_names(hub: Hub) -> None:
    answers = [
        await hub.http.post("/v1/login", json={"user": user, "password": "wrong"})
        for user in ("admin", "nobody", "admin", "nobody", "admin", "nobody")
    ]
    assert [a.status_code for a in answers] == [401] * 5 + [429]
    assert len({a.text for a in answers[:5]}) == 1
    assert int(answers[5].headers["Retry-After"]) >= 1


async def test_bad_users_are_refused_with_a_hint(hub: Hub) -> None:
    admin = await hub.login()
    for name, password, roles, status in (
        ("Bad Name", PASSWORD, ["viewer"], 422),
        ("good", "short", ["viewer"], 422),
        ("good", PASSWORD, ["emperor"], 422),
        ("admin", PASSWORD, ["viewer"], 409),
    ):
        answer = await admin.post("/v1/users", json={"name": name, "password": password, "roles": roles})
        assert answer.status_code == status
    assert (await admin.delete("/v1/users/admin")).status_code == 409
    assert (await admin.delete("/v1/users/nobody")).status_code == 404


def test_the_backoff_doubles_forgives_and_stays_small() -> None:
    now = 0.0
    backoff = Backoff(clock=lambda: now)
    for _ in range(Backoff.FREE):
        assert backoff.wait_s("k") == 0
        backoff.failed("k")
    waits = []
    for _ in range(12):
        waits.append(backoff.wait_s("k"))
        now += waits[-1]
        backoff.failed("k")
    assert waits[:4] == [1, 2, 4, 8]
    assert max(waits) == Backoff.LONGEST_S
    backoff.succeeded("k")
    assert backoff.wait_s("k") == 0
    for n in range(5000):
        backoff.failed(str(n))
    assert len(backoff._failures) == Backoff.MAX


def test_a_route_without_an_action_keeps_the_hub_from_starting() -> None:
    router = APIRouter(prefix="/v1")

    @router.get("/secrets")
    def secrets() -> str:
        return "all of them"

    with pytest.raises(Fatal, match="/v1/secrets declares no action"):
        declare_actions(router)


async def test_the_page_of_the_api_loads_nothing_from_elsewhere(hub: Hub) -> None:
    page = (await hub.http.get("/docs")).text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith("/"), address
        assert (await hub.http.get(address)).status_code == 200


async def test_a_role_for_a_group_reaches_its_devices_alone_at_the_hub_and_on_the_device(hub: Hub) -> None:
    admin = await hub.login()
    for name in ("press-1", "press-2"):
        await enrolled(hub, name)
    for wrong in ("run:task:group=", "run:task:planet=mars", "run:task:group=a&b"):
        answer = await admin.put("/v1/roles/line-2", json={"permissions": [wrong]})
        assert answer.status_code == 422, wrong
    given = ["run:task:group=line-2", "call:tool:group=line-2&tool=set_*"]
    assert (await admin.put("/v1/roles/line-2", json={"permissions": given})).status_code == 204
    ann = await hub.user("line-2")

    async def asked(device: str) -> int:
        return (await ann.post(f"/v1/devices/{device}/tasks", json={"text": "stop line 2"})).status_code

    assert [await asked("press-1"), await asked("press-2")] == [403, 403], "nobody is in the group"
    labelled = await admin.put("/v1/devices/press-1/labels", json={"groups": ["line-2"], "tags": []})
    assert labelled.status_code == 200, labelled.text
    assert [await asked("press-1"), await asked("press-2")] == [201, 403]
    there = verify_grants(hub.services.key.public, (await admin.get("/v1/grants")).text)
    subject, now = Subject("some-line-2", ["line-2"], time.time() + 1), time.time()
    assert allowed(there, subject, "call:tool", "set_speed", now=now, device="press-1")
    assert not allowed(there, subject, "call:tool", "stop_line", now=now, device="press-1")
    assert not allowed(there, subject, "call:tool", "set_speed", now=now, device="press-2")
    await admin.put("/v1/devices/press-1/labels", json={"groups": [], "tags": []})
    assert await asked("press-1") == 403
