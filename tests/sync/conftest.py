import datetime
import ipaddress
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from tests.sync.brokers import Embedded, Mosquitto, mosquitto

Broker = Embedded | Mosquitto
needs_mosquitto = pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto")


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    made: Broker = Embedded(tmp_path) if request.param == "embedded" else Mosquitto(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state" / "state.db")
    yield opened
    opened.close()


@pytest.fixture
async def outbox(store: Store) -> AsyncIterator[Outbox]:
    return await Outbox.open(store)


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes a self-signed certificate for an IP address: paths of certificate and key."""

    def make(address: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
        now = datetime.datetime.now(datetime.UTC)
        cert = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
            .add_extension(x509.BasicConstraints(True, None), True)
            .sign(key, hashes.SHA256())
        )
        paths = tmp_path / "cert.pem", tmp_path / "key.pem"
        paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        none, pem = serialization.NoEncryption(), serialization.Encoding.PEM
        paths[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
        return paths

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB with 1 MiB free, and a file `filler` that can be removed to make room."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    (tmp_path / "filler").write_bytes(bytes(1 << 20))
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)
