"""Who is refused at a device's own API is in its chain, from where, and a flood of refusals is few entries."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec

from edge_agent.api.access import Device
from edge_agent.api.app import create_app
from edge_agent.audit import Audit
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_access_token
from tests.sync.test_watch import bodies


async def test_strangers_and_those_who_may_not_are_told_of_with_their_address(tmp_path: Path) -> None:
    store, key, now = Store(tmp_path / "s.db"), SigningKey.generate(), 1000.0
    outbox = await Outbox.open(store)
    audit = Audit(store, outbox)
    grants = Grants(1, 0.0, 1e12, SHIPPED_ROLES, [public_jwk(key.public)])
    device = cast(Device, SimpleNamespace(grants=lambda: grants))
    app = create_app(device, clock=lambda: now, name="press-1", refused=audit.refused)
    token = issue_access_token(key, "vera", ["viewer"], now=now, lifetime_s=60)
    transport = httpx.ASGITransport(app, client=("10.0.0.9", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://device") as client:
        for _ in range(5):
            assert (await client.get("/v1/status")).status_code == 401
        audit._quiet.clear()
        shown = {"Authorization": f"Bearer {token}"}
        assert (await client.post("/v1/tasks", json={"text": "x"}, headers=shown)).status_code == 403
    told: list[dict[str, Any]] = await bodies(outbox, "audit")
    assert [(each["event"], each["subject"], each["path"], each["where"]) for each in told] == [
        ("refuse:request", "unknown", "GET /v1/status", "10.0.0.9"),
        ("refuse:request", "vera", "POST /v1/tasks", "10.0.0.9"),
    ]
    assert told[1]["prev"], "chained"
    assert msgspec.json.encode(told[0])
    store.close()
