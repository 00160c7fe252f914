"""What the API and the dashboard call: one object with the hub's domain services, on `app.state.services`."""

import asyncio
from dataclasses import dataclass

from edge_agent.sync.transport import MqttSession
from edge_agent.wire.messages import Desired
from edge_agent.wire.signing import SigningKey
from hub.audit import Audit
from hub.auth import Auth
from hub.blobs import Uploads
from hub.broker import EmbeddedBroker, Mosquitto
from hub.ca import Authority
from hub.db import Database
from hub.devices import Devices
from hub.downlink import Downlink
from hub.fanout import Fanouts
from hub.jobs import Jobs
from hub.registry import Registry
from hub.retention import Retention
from hub.rollout_runner import Rollouts
from hub.telemetry import Telemetry
from hub.twin import Twin, direction
from hub.upstream import Upstream


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
    fanouts: Fanouts
    registry: Registry
    rollouts: Rollouts
    telemetry: Telemetry
    uploads: Uploads
    audit: Audit
    authority: Authority
    retention: Retention
    models: Upstream | None = None

    async def assign_bundle(self, device: str, name: str, version: str, by: str) -> Desired:
        """Direct the device to install a published bundle. Raises Refused 404, 409 (made for other hardware)."""
        manifest, target = await self.registry.get(name, version)
        direct = direction(self.key, self.fleet, name, manifest, target)
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
