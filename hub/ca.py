"""The hub's own certificate authority (RFC 5280): a root that may be offline, an issuing key, short-lived leaves.

Invariants: the root key signs the issuing certificate and nothing else, lives in a folder of its own and is not read to
run; a leaf is for the key whose possession the CSR proves, and takes nothing else from the CSR; a leaf lives three
times the longest outage, so one that is renewed at two thirds of its life is good for a whole outage at any moment.
The CRL stays valid as long as the issuing certificate: a broker whose CRL has run out refuses everybody.
"""

import datetime
import ipaddress
import ssl
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_agent.wire import durable
from edge_agent.wire.signing import VerifyKey
from hub.errors import Fatal, Refused

DAY_S = 86400.0
ROOT_S, ISSUING_S = 7300 * DAY_S, 3650 * DAY_S
BACKDATED_S = 3600.0  # for readers whose clock is a little behind
_NONE = serialization.NoEncryption()
_PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey


class Authority:
    """Issues for one fleet. `folder` holds the issuing key; `root` is needed to make or renew that, and else never.

    Raises:
        Fatal: when a file is damaged or missing.
    """

    def __init__(self, folder: Path, root: Path, fleet: str, outage_s: float = 30 * DAY_S) -> None:
        self.folder, self.fleet, self.leaf_s = folder, fleet, 3 * outage_s
        try:
            if not (folder / "issuing.pem").exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                renew_issuing(folder, root, fleet)
            self.root_pem = (folder / "root.pem").read_text()
            self.issuing_pem = (folder / "issuing.pem").read_text()
            self._issuer = x509.load_pem_x509_certificate(self.issuing_pem.encode())
            self._key = _load(folder / "issuing.key")
        except (OSError, ValueError) as error:
            raise Fatal(f"the certificate authority in {folder} cannot be used: {error}", "restore it") from error

    @property
    def trusted_pem(self) -> str:
        """What a broker checks clients against."""
        return self.issuing_pem + self.root_pem

    def certify(self, csr: str, device: str, public_key: str) -> x509.Certificate:
        """A device's certificate. Raises Refused 422 unless the CSR proves that the device has its known key."""
        try:
            request = x509.load_pem_x509_csr(csr.encode())
            key, known = request.public_key(), VerifyKey.from_text(public_key)
            proven = request.is_signature_valid
        except Exception as error:  # noqa: BLE001 - whatever the parser makes of a stranger's bytes
            raise Refused(422, f"the CSR cannot be read: {error}", "send a PKCS#10 request in PEM") from None
        if not proven or not isinstance(key, Ed25519PublicKey) or VerifyKey(key).raw != known.raw:
            raise Refused(422, "the CSR does not prove the device's key", "sign it with the key that is enrolled")
        return self._leaf(device, key, ExtendedKeyUsageOID.CLIENT_AUTH)

    def client(self, folder: Path, name: str) -> None:
        """A fresh key and certificate for a client on this machine: `ca.pem`, and `cert.pem` with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._leaf(name, key.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.write(folder / "ca.pem", self.root_pem.encode(), 0o600)
        durable.write(folder / "cert.pem", self.chain(leaf).encode() + _pem(key), 0o600)

    def server(self, names: Sequence[str]) -> tuple[str, bytes]:
        """Certificate chain and key of a server with these DNS names and addresses, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        known = x509.SubjectAlternativeName([_general(name) for name in names])
        leaf = self._leaf(names[0], key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, ISSUING_S / 4, known)
        return self.chain(leaf), _pem(key)

    def https(self, folder: Path, names: Sequence[str], given: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """A server's context, from given files or from our own, made anew when they name others or run out.

        Raises Fatal.
        """
        cert, key = given or (folder / "cert.pem", folder / "key.pem")
        try:
            if not given and not _serves(cert, names):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                chain, secret = self.server(names)
                durable.write(key, secret, 0o600)
                durable.write(cert, chain.encode())
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            return context
        except (OSError, ValueError) as error:
            text = f"HTTPS cannot be served with {cert} and {key}: {error}"
            raise Fatal(text, "give --cert and --key in PEM") from None

    def chain(self, leaf: x509.Certificate) -> str:
        """The leaf and what signed it, PEM."""
        return leaf.public_bytes(serialization.Encoding.PEM).decode() + self.issuing_pem

    def crl(self, revoked: Iterable[tuple[str, float]]) -> bytes:
        """The list of revoked serials (hex) with the time of each, PEM."""
        now = datetime.datetime.now(datetime.UTC)
        begin, until = now - datetime.timedelta(seconds=BACKDATED_S), self._issuer.not_valid_after_utc
        builder = x509.CertificateRevocationListBuilder(self._issuer.subject, begin, until)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        for serial, when in revoked:
            entry = x509.RevokedCertificateBuilder(int(serial, 16), datetime.datetime.fromtimestamp(when, datetime.UTC))
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _leaf(
        self,
        name: str,
        key: _PublicKey,
        use: x509.ObjectIdentifier,
        seconds: float | None = None,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        more = [names] if names else []
        subject = _subject(name, self.fleet)
        usage = x509.ExtendedKeyUsage([use])
        extensions = [x509.BasicConstraints(ca=False, path_length=None), usage, _usage(sign=False), *more]
        latest = self._issuer.not_valid_after_utc
        return _sign(subject, key, self._issuer.subject, self._key, seconds or self.leaf_s, extensions, latest)


def renew_issuing(folder: Path, root: Path, fleet: str) -> None:
    """Sign the issuing certificate (again) with the root key, which is made at the first call. Raises Fatal."""
    try:
        if not (root / "root.key").exists():
            if (folder / "root.pem").exists():
                raise Fatal(f"the root key is not in {root}", "bring it back for this command, or name its folder")
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            key, name = ec.generate_private_key(ec.SECP256R1()), _subject(f"Outrider root of {fleet}", fleet)
            durable.write(root / "root.key", _pem(key), 0o600)
            own = _sign(name, key.public_key(), name, key, ROOT_S, [x509.BasicConstraints(True, 1), _usage(sign=True)])
            durable.write(root / "root.pem", own.public_bytes(serialization.Encoding.PEM))
        root_key, certificate = (
            _load(root / "root.key"),
            x509.load_pem_x509_certificate((root / "root.pem").read_bytes()),
        )
        known = (folder / "issuing.key").exists()
        issuing = _load(folder / "issuing.key") if known else ec.generate_private_key(ec.SECP256R1())
        name = _subject(f"Outrider issuing of {fleet}", fleet)
        extensions = [x509.BasicConstraints(True, 0), _usage(sign=True)]
        latest = certificate.not_valid_after_utc
        made = _sign(name, issuing.public_key(), certificate.subject, root_key, ISSUING_S, extensions, latest)
        durable.write(folder / "issuing.key", _pem(issuing), 0o600)
        durable.write(folder / "root.pem", (root / "root.pem").read_bytes())
        durable.write(folder / "issuing.pem", made.public_bytes(serialization.Encoding.PEM))
    except (OSError, ValueError) as error:
        raise Fatal(f"the issuing certificate cannot be made: {error}", f"check {root} and {folder}") from error


def _serves(cert: Path, names: Sequence[str]) -> bool:
    """Whether it is there, for these names, and good for another third of its life."""
    if not cert.exists():
        return False
    known = x509.load_pem_x509_certificate(cert.read_bytes())
    held = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    begin, end = known.not_valid_before_utc.timestamp(), known.not_valid_after_utc.timestamp()
    return set(held) == {_general(name) for name in names} and time.time() < end - (end - begin) / 3


def _sign(
    subject: x509.Name,
    key: _PublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    seconds: float,
    extensions: Sequence[x509.ExtensionType],
    latest: datetime.datetime | None = None,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(seconds=seconds)
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(seconds=BACKDATED_S))
    builder = builder.not_valid_after(min(until, latest) if latest else until)
    own, above = x509.SubjectKeyIdentifier.from_public_key, x509.AuthorityKeyIdentifier.from_issuer_public_key
    for extension in (*extensions, own(key), above(issuer_key.public_key())):
        builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not sign, False, False, False, False, sign, sign, False, False)


def _subject(name: str, fleet: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds no elliptic curve key")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, _NONE)
