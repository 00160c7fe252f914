"""The local API: no token, no answer; a token is worth what the cached grants say, with no network at all."""

import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from starlette.routing import Route

from edge_agent.agent import mcp_serve
from edge_agent.agent.policy import Forbidden
from edge_agent.agent.tool import ToolSpec
from edge_agent.api.access import MAX_BODY
from edge_agent.api.app import create_app
from edge_agent.errors import Refused, Retry
from edge_agent.hosting import Hosting
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, public_jwk
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_access_token, issue_device_token

KEY = SigningKey.generate()
NOW = time.time()


class Plant:
    """A device of the API's Protocol that keeps what it is asked."""

    def __init__(self) -> None:
        self.known: Grants | None = Grants(1, NOW, NOW + 3600, SHIPPED_ROLES, [public_jwk(KEY.public)])
        self.asked: list[tuple[str, str]] = []
        self.full = False
        self.work = self.blobs = self
        self.counts = {"wrong_calls": 2}
        self.models = Hosting({})

    def grants(self) -> Grants | None:
        return self.known

    def healthy(self) -> bool:
        return self.known is not None

    async def status(self) -> dict[str, Any]:
        return {"device": "press-1"}

    async def submit(self, text: str, subject: Subject, conversation: str = "") -> str:
        if self.full:
            raise Retry("32 tasks are waiting", "try again later")
        if not text:
            raise Refused("an empty request", "write something")
        self.asked.append((text, subject.name))
        return "t1"

    async def put(self, content: bytes, name: str, media_type: str) -> str:
        self.asked.append((content.decode(), f"{name} {media_type}"))
        return "ab" * 32

    async def task(self, id: str) -> Any | None:
        return {"id": id, "state": "succeeded"} if id == "t1" else None

    async def tasks(self) -> list[Any]:
        return [{"id": "t1"}]

    async def tools(self, subject: Subject) -> list[ToolSpec]:
        if self.full:
            raise Retry("the tools process is not ready", "its log says why it does not start")
        return []

    async def call(self, name: str, args: dict[str, Any], subject: Subject) -> Any:
        if "viewer" in subject.roles:
            raise Forbidden(f"{subject.name} may not use {name}", "ask an operator")
        if name == "odd":
            raise ZeroDivisionError
        return args


@pytest.fixture
def plant() -> Plant:
    return Plant()


@pytest.fixture
async def client(plant: Plant) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(plant), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://device") as made:
        yield made


def bearer(*roles: str, key: SigningKey = KEY, ago_s: float = 0.0) -> dict[str, str]:
    token = issue_access_token(key, "ada", list(roles), now=time.time() - ago_s, lifetime_s=600)
    return {"Authorization": f"Bearer {token}"}


ROUTES = [
    ("GET", "/v1/status"),
    ("GET", "/metrics"),
    ("GET", "/v1/tasks"),
    ("GET", "/v1/tasks/t1"),
    ("POST", "/v1/tasks"),
    ("POST", "/v1/tools/read_sensor"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_asks_for_a_token(client: httpx.AsyncClient, method: str, path: str) -> None:
    others = SigningKey.generate()
    bad: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic YTpi"},
        bearer("admin", key=others),
        bearer("admin", ago_s=7200),
        {"Authorization": f"Bearer {issue_device_token(KEY, 'outrider', 'ada', now=NOW)}"},
    ]
    for headers in bad:
        response = await client.request(method, path, headers=headers, json={"text": "x"})
        assert response.status_code == 401, headers
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["hint"]
        assert response.headers["www-authenticate"] == "Bearer"


async def test_no_route_but_the_health_checks_is_open(client: httpx.AsyncClient, plant: Plant) -> None:
    opened = []
    for route in create_app(plant).routes:
        assert isinstance(route, Route)
        for method in route.methods or ():
            answer = await client.request(method, re.sub(r"{\w+}", "x", route.path), content=b"{}")
            if answer.status_code != 401:
                opened.append(route.path)
            elif method != "HEAD":
                assert answer.json()
    assert set(opened) == {"/healthz", "/v2/health/live", "/v2/health/ready"}


async def test_the_health_of_the_device_needs_no_token(client: httpx.AsyncClient, plant: Plant) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    plant.known = None
    assert (await client.get("/healthz")).status_code == 503
    assert (await client.get("/v1/status", headers=bearer("admin"))).status_code == 503


async def test_an_image_is_taken_for_upload_from_who_may(client: httpx.AsyncClient, plant: Plant) -> None:
    kind = {"Content-Type": "image/png"}
    accepted = await client.post("/v1/blobs?name=weld", content=b"PNG", headers=bearer("operator") | kind)
    assert (accepted.status_code, accepted.json()) == (202, {"sha256": "ab" * 32})
    assert plant.asked == [("PNG", "weld image/png")]
    assert (await client.post("/v1/blobs", content=b"PNG", headers=bearer("viewer"))).status_code == 403


async def test_a_role_for_a_group_is_good_on_the_devices_of_that_group_alone(plant: Plant) -> None:
    assert plant.known is not None
    roles, groups = {"fitter": ["run:task:group=line-2"]}, {"line-2": ["press-1"]}
    plant.known = msgspec.structs.replace(plant.known, roles=roles, groups=groups)
    codes = []
    for name in ("press-1", "press-2"):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(plant, name=name)), base_url="http://d"
        ) as at:
            codes.append((await at.post("/v1/tasks", json={"text": "how hot"}, headers=bearer("fitter"))).status_code)
    assert codes == [202, 403]


async def test_an_operator_runs_a_task_and_reads_it(client: httpx.AsyncClient, plant: Plant) -> None:
    accepted = await client.post("/v1/tasks", json={"text": "how hot"}, headers=bearer("operator"))
    assert (accepted.status_code, accepted.json()) == (202, {"id": "t1"})
    assert plant.asked == [("how hot", "ada")]
    assert (await client.get("/v1/tasks/t1", headers=bearer("viewer"))).json()["state"] == "succeeded"
    assert (await client.get("/v1/tasks", headers=bearer("viewer"))).json() == [{"id": "t1"}]
    assert (await client.get("/v1/tasks/t9", headers=bearer("viewer"))).status_code == 404


async def test_a_role_that_may_not_is_told_which_permission_is_missing(client: httpx.AsyncClient, plant: Plant) -> None:
    refused = await client.post("/v1/tasks", json={"text": "x"}, headers=bearer("viewer"))
    assert refused.status_code == 403
    assert "run:task" in refused.json()["detail"]
    assert "viewer" in refused.json()["hint"]
    tool = await client.post("/v1/tools/stop_line", json={}, headers=bearer("viewer"))
    assert tool.status_code == 403
    plant.known = Grants(2, NOW, NOW + 3600, SHIPPED_ROLES, [public_jwk(KEY.public)], {"ada": time.time() + 5})
    revoked = await client.post("/v1/tasks", json={"text": "x"}, headers=bearer("admin"))
    assert revoked.status_code == 403
    plant.known = Grants(3, NOW - 7200, NOW - 60, SHIPPED_ROLES, [public_jwk(KEY.public)])
    assert (await client.post("/v1/tasks", json={"text": "x"}, headers=bearer("admin"))).status_code == 403
    assert (await client.get("/v1/tasks", headers=bearer("admin"))).status_code == 200


async def test_what_the_agent_did_wrong_is_counted_in_the_metrics(client: httpx.AsyncClient, plant: Plant) -> None:
    text = (await client.get("/metrics", headers=bearer("viewer"))).text
    assert '# TYPE outrider_agent_total counter\noutrider_agent_total{what="wrong_calls"} 2\n' in text


async def test_bad_input_is_a_problem_with_a_hint(client: httpx.AsyncClient, plant: Plant) -> None:
    admin = bearer("admin")
    answers = {
        400: await client.post("/v1/tasks", content=b'{"text": 5}', headers=admin),
        413: await client.post("/v1/tasks", content=b"x" * (MAX_BODY + 1), headers=admin),
        422: await client.post("/v1/tasks", json={"text": ""}, headers=admin),
        404: await client.get("/v1/nowhere", headers=admin),
        405: await client.put("/v1/tasks", headers=admin),
        500: await client.post("/v1/tools/odd", json={}, headers=admin),
    }
    plant.full = True
    answers[503] = await client.post("/v1/tasks", json={"text": "x"}, headers=admin)
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]
        assert answer.json()["hint"]
    assert answers[503].headers["retry-after"] == "5"


async def test_while_the_tools_restart_a_good_token_is_not_told_to_be_a_bad_one(
    client: httpx.AsyncClient, plant: Plant
) -> None:
    """An MCP client that is told so asks its person to log in again, and forgets the token."""
    device = mcp_serve.Device("device")
    device._client = client
    good = bearer("operator")["Authorization"].partition(" ")[2]
    assert await device.verify_token("forged") is None
    assert await device.verify_token(good) is not None
    plant.full = True
    with pytest.raises(Retry, match="is not ready"):
        await device.verify_token(good)
