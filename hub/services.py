"""What the API and the dashboard call: one object with the hub's domain services, on `app.state.services`."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.sync.transport import MqttSession
from edge_agent.wire.bundle import Directive, Sealed, open_directive, seal_directive
from edge_agent.wire.messages import Desired
from edge_agent.wire.signing import SigningKey
from hub.audit import Audit
from hub.auth import Auth
from hub.broker import EmbeddedBroker, Mosquitto
from hub.db import Database
from hub.devices import Devices
from hub.downlink import Downlink
from hub.errors import Refused
from hub.jobs import Jobs
from hub.registry import Registry
from hub.telemetry import Telemetry
from hub.twin import Twin


@dataclass(frozen=True)
class BrokerAddress:
    """What a device is told at enrolment; `ca` is PEM text or empty."""

    url: str
    username: str
    password: str
    ca: str = ""


@dataclass(frozen=True)
class Services:
    """Everything one hub process is made of."""

    fleet: str
    key: SigningKey
    db: Database
    broker: EmbeddedBroker | None
    mosquitto: Mosquitto
    address: BrokerAddress
    session: MqttSession
    downlink: Downlink
    auth: Auth
    devices: Devices
    twin: Twin
    jobs: Jobs
    registry: Registry
    telemetry: Telemetry
    audit: Audit

    async def assign_bundle(self, device: str, name: str, version: str, by: str) -> Desired:
        """Direct the device to install a published bundle. Raises Refused 404, 409 (made for other hardware)."""
        manifest, target = await self.registry.get(name, version)

        def direct(row: sa.Row[Any]) -> dict[str, Any]:
            hardware = str(row.reported.get("agent", {}).get("machine", ""))
            if hardware and manifest.hardware and hardware not in manifest.hardware:
                need = f"{name} {version} is for {', '.join(manifest.hardware)}"
                raise Refused(409, f"{need}, {device} is {hardware}", "assign a version for its hardware")
            before = row.desired.get("director")
            known = open_directive(self.key.public, msgspec.convert(before, Sealed)) if before else None
            bundles = (known.bundles if known else {}) | {name: target}
            counter = known.counter + 1 if known else 1
            directive = Directive(self.fleet, device, hardware, counter, time.time(), bundles)
            sealed = seal_directive(self.key, directive)
            return msgspec.to_builtins({"bundles": bundles, "director": sealed})  # type: ignore[no-any-return]

        return await self.twin.patch_desired(device, direct, by, "assign:bundle")

    async def revoke_user(self, name: str, by: str) -> None:
        """Void somebody's tokens here at once, and on devices with the next grants they get."""
        await self.auth.revoke(name, by)
        await self.publish_grants()

    async def publish_grants(self) -> None:
        """Devices that are there have the newest grants a moment later."""
        await self.downlink.grants(self.auth.grants_text)

    async def revoke_device(self, name: str, by: str) -> None:
        """Void a device's key and certificates, here and at the broker at once. Raises Refused 404."""
        await self.devices.revoke(name, by)
        await self.tell_broker()

    async def tell_broker(self) -> None:
        """Have the broker refuse what is void."""
        await asyncio.to_thread(self.mosquitto.tell, *await self.devices.void())
