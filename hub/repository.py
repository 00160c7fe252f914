"""The TUF repository: who may say what is installed, on files that anybody may mirror.

    <folder>/metadata/{N.root, N.targets, N.<role>, N.snapshot, timestamp}.json    what devices read
    <folder>/drafts/{root, targets}.json                                           waiting for signatures, and new keys
    <folder>/keys/{snapshot, timestamp, <role>}.key                                online keys

Root and targets are signed by a threshold of offline keys, which this machine need not have: a change to either is a
draft that each holder signs, and becomes current with the last signature. Targets lists no file: it delegates paths to
roles, terminating, so that a role signs its own models and no others. Roles, snapshot and timestamp have online keys.

Invariants: the folder is the state, so a copy of it can be signed elsewhere; one writer at a time; the timestamp is
written last, so a reader sees the repository before a change or after it (theupdateframework.github.io/specification).
"""

import fcntl
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edge_agent.wire import durable
from hub.errors import Refused

DAYS = {"root": 365.0, "targets": 365.0, "snapshot": 14.0, "timestamp": 1.0}
ROLE_DAYS = 90.0
OFFLINE = ("root", "targets")
ONLINE = ("snapshot", "timestamp")
KEPT = 8
"""Versions of each role that stay on disk, root apart: whoever reads the one before goes on."""
_SERIALIZER = JSONSerializer(compact=True)


def load_key(path: Path) -> CryptoSigner:
    """A private key in PEM. Raises Refused 422."""
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(422, f"{path} is not a private key: {error}", "outrider trust key FILE makes one") from error


def make_key(path: Path) -> CryptoSigner:
    """A new Ed25519 key, kept for its owner alone. Raises Refused 409 when the file exists."""
    if path.exists():
        raise Refused(409, f"{path} exists", "a key is never written over")
    key = CryptoSigner.generate_ed25519()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    durable.write(path, key.private_bytes, 0o600)
    return key


class Repository:
    """All methods block: call them in a thread. `clock` gives seconds since the Unix epoch."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock = folder, clock
        self._metadata, self._drafts, self._keys = (folder / part for part in ("metadata", "drafts", "keys"))

    @property
    def exists(self) -> bool:
        return (self._metadata / "timestamp.json").exists()

    def file(self, name: str) -> bytes:
        """A metadata file by its name. Raises Refused 404."""
        try:
            return (self._metadata / Path(name).name).read_bytes()
        except FileNotFoundError:
            raise Refused(404, f"no metadata {name}", "outrider trust ceremony makes a repository") from None

    def root(self) -> bytes:
        """The newest root."""
        return self.file(f"{self._version('root')}.root.json")

    # ceremonies

    def create(self, offline: Sequence[CryptoSigner], threshold: int, roles: Mapping[str, Sequence[str]]) -> None:
        """Make root and targets of these offline keys, and online keys for `roles` (name → path patterns).

        Raises:
            Refused: 409 when there is one already, 422 when the threshold cannot be met.
        """
        if not 1 <= threshold <= len({key.public_key.keyid for key in offline}):
            raise Refused(422, f"a threshold of {threshold} of {len(offline)} keys", "give more keys, or a lower one")
        for folder in (self._metadata, self._drafts, self._keys):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            if self.exists:
                raise Refused(409, f"{self.folder} has a repository", "outrider trust rotate changes its keys")
            root, targets = Root(consistent_snapshot=True), Targets(delegations=Delegations({}, {}))
            self._set_offline(root, [key.public_key for key in offline], threshold)
            for name in ONLINE:
                root.add_key(make_key(self._keys / f"{name}.key").public_key, name)
            for name, paths in roles.items():
                self._delegate(targets, name, paths, make_key(self._keys / f"{name}.key").public_key)
            for name, signed in (("root", root), ("targets", targets)):
                self._write(name, Metadata(signed), offline)
            self._renew()

    def rotate(self, keys: Sequence[Key] = (), threshold: int = 0, online: bool = False) -> None:
        """Draft a root with other offline keys, another threshold, new snapshot and timestamp keys, or a longer life.

        Raises:
            Refused: 422 when the threshold cannot be met.
        """

        def change(root: Root) -> None:
            held = list(keys) or [root.get_key(keyid) for keyid in root.roles["root"].keyids]
            enough = threshold or min(root.roles["root"].threshold, len(held))
            if not 1 <= enough <= len(held):
                raise Refused(422, f"a threshold of {enough} of {len(held)} keys", "give more keys, or a lower one")
            self._set_offline(root, held, enough)
            for name in ONLINE if online else ():
                for keyid in list(root.roles[name].keyids):
                    root.revoke_key(keyid, name)
                root.add_key(self._next_key(name), name)

        self._draft("root", change)

    def delegate(self, role: str, paths: Sequence[str], key: Key | None = None) -> None:
        """Draft that paths are signed by a role from now on, before every other role; no key: an online one is made."""
        if role in DAYS or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", role):
            raise Refused(
                422, f"{role!r} cannot be a role's name", "use a-z, 0-9, '-' and '_'; root and such are taken"
            )

        def change(targets: Targets) -> None:
            self._delegate(targets, role, paths, key or self._next_key(role))

        self._draft("targets", change)

    def prolong(self) -> None:
        """Draft the same targets with a new life."""
        self._draft("targets", lambda targets: None)

    def sign(self, role: str, key: CryptoSigner) -> int:
        """Sign a draft; how many signatures it still lacks, of the keys before or after. The last makes it current.

        Raises:
            Refused: 404 when there is no draft, 409 when it is out of date.
        """
        with self._locked():
            path = self._drafts / f"{role}.json"
            if not path.exists():
                raise Refused(404, f"no draft of {role}", "outrider trust rotate or delegate makes one")
            draft: Metadata[Any] = Metadata.from_file(str(path))
            draft.sign(key, append=True)
            durable.write(path, draft.to_bytes(_SERIALIZER))
            if missing := self._missing(role, draft):
                return missing
            if draft.signed.version != self._version(role) + 1:
                path.unlink()
                raise Refused(409, f"the draft of {role} is for another version", "make it again")
            self._put(role, draft)
            for fresh in self._drafts.glob(f"{role}+*.key"):
                fresh.replace(self._keys / fresh.name.partition("+")[2])
            path.unlink()
            self._renew(anew=True)
            return 0

    # what the hub does by itself

    def publish(self, files: Mapping[str, tuple[int, str]]) -> str:
        """Sign targets (path → bytes, SHA-256); the role that did. Raises Refused 409 when its key is not here."""
        with self._locked():
            (role,) = {self._role_of(path) for path in files}
            if not (self._keys / f"{role}.key").exists():
                hint = "put its key beside the others, or delegate these paths to a role of this hub"
                raise Refused(409, f"the key of role {role}, which signs {', '.join(files)}, is not here", hint)
            md: Metadata[Targets] = self._load(role)
            fresh = {path: TargetFile(length, {"sha256": sha256}, path) for path, (length, sha256) in files.items()}
            if any(md.signed.targets.get(path) != target for path, target in fresh.items()):
                md.signed.targets |= fresh
                self._write(role, md, [self._online(role)])
                self._renew()
            return role

    def renew(self) -> dict[str, float]:
        """Sign again what has lived half its life; days left by role."""
        with self._locked():
            self._renew()
            roles = [role for role in ("root", *self._roles(), *ONLINE) if self._version(role)]
            return {role: (self._load(role).signed.expires.timestamp() - self._clock()) / 86400 for role in roles}

    def show(self) -> dict[str, Any]:
        """Versions, expiry, keys and thresholds, delegations, drafts."""
        root, targets = self._load("root").signed, self._load("targets").signed
        delegated = targets.delegations.roles.values()
        held = {**root.roles, **{role.name: role for role in delegated if self._version(role.name)}}
        return {
            "roles": {
                name: {
                    "version": (signed := self._load(name).signed).version,
                    "expires": signed.expires.isoformat(),
                    "threshold": role.threshold,
                    "keys": role.keyids,
                }
                for name, role in held.items()
            },
            "delegations": {role.name: role.paths for role in delegated},
            "drafts": {
                path.stem: self._missing(path.stem, Metadata.from_file(str(path)))
                for path in sorted(self._drafts.glob("*.json"))
            },
        }

    # how

    def _set_offline(self, root: Root, keys: Sequence[Key], threshold: int) -> None:
        for name in OFFLINE:
            for keyid in list(root.roles[name].keyids):
                root.revoke_key(keyid, name)
            for key in keys:
                root.add_key(key, name)
            root.roles[name].threshold = threshold

    @staticmethod
    def _delegate(targets: Targets, role: str, paths: Sequence[str], key: Key) -> None:
        assert targets.delegations is not None
        known = targets.delegations.roles or {}
        known.pop(role, None)
        targets.delegations.roles = {role: DelegatedRole(role, [], 1, True, list(paths)), **known}
        targets.add_key(key, role)

    def _draft(self, role: str, change: Callable[[Any], None]) -> None:
        with self._locked():
            md = self._load(role)
            change(md.signed)
            md.signatures.clear()
            self._stamp(role, md)
            durable.write(self._drafts / f"{role}.json", md.to_bytes(_SERIALIZER))

    def _missing(self, role: str, draft: Metadata[Any]) -> int:
        root: Root = self._load("root").signed
        if role == "root":
            both = draft.signed.get_root_verification_result(root, draft.signed_bytes, draft.signatures)
            return int(max(both.first.missing, both.second.missing))
        return int(root.get_verification_result(role, draft.signed_bytes, draft.signatures).missing)

    def _renew(self, anew: bool = False) -> None:
        if not (self._keys / "timestamp.key").exists():
            return  # a copy of the folder, for signing; the hub goes on
        for role in self._roles()[1:]:
            if (anew or self._is_old(role)) and (self._keys / f"{role}.key").exists():
                signed = self._load(role) if self._version(role) else Metadata(Targets())
                self._write(role, signed, [self._online(role)])
        listed = {f"{role}.json": version for role in self._roles() if (version := self._version(role))}
        snapshot: Metadata[Snapshot] = self._load("snapshot") if self._version("snapshot") else Metadata(Snapshot())
        if anew or listed != {n: m.version for n, m in snapshot.signed.meta.items()} or self._is_old("snapshot"):
            snapshot.signed.meta = {name: MetaFile(version) for name, version in listed.items()}
            self._write("snapshot", snapshot, [self._online("snapshot")])
        timestamp: Metadata[Timestamp] = self._load("timestamp") if self.exists else Metadata(Timestamp())
        current = self._version("snapshot")
        if anew or timestamp.signed.snapshot_meta.version != current or self._is_old("timestamp"):
            timestamp.signed.snapshot_meta = MetaFile(current)
            self._write("timestamp", timestamp, [self._online("timestamp")])

    def _roles(self) -> list[str]:
        targets: Targets = self._load("targets").signed
        return ["targets", *(targets.delegations.roles or {} if targets.delegations else {})]

    def _role_of(self, path: str) -> str:
        targets: Targets = self._load("targets").signed
        for name, _ in targets.delegations.get_roles_for_target(path) if targets.delegations else ():
            return name
        raise Refused(409, f"no role may sign {path}", "outrider trust delegate")

    def _is_old(self, role: str) -> bool:
        if not self._version(role):
            return True
        left = self._load(role).signed.expires.timestamp() - self._clock()
        return bool(left < DAYS.get(role, ROLE_DAYS) * 86400 / 2)

    def _online(self, role: str) -> CryptoSigner:
        return load_key(self._keys / f"{role}.key")

    def _next_key(self, role: str) -> Key:
        """A new online key, in use when the draft is signed."""
        path = self._drafts / f"{'root' if role in ONLINE else 'targets'}+{role}.key"
        path.unlink(missing_ok=True)
        return make_key(path).public_key

    def _version(self, role: str) -> int:
        """The newest version on disk, 0 when there is none."""
        if role == "timestamp":
            return self._load(role).signed.version if self.exists else 0
        return max((int(path.name.partition(".")[0]) for path in self._metadata.glob(f"*.{role}.json")), default=0)

    def _load(self, role: str) -> Metadata[Any]:
        name = "timestamp.json" if role == "timestamp" else f"{self._version(role)}.{role}.json"
        try:
            return Metadata.from_bytes(self.file(name))
        except RepositoryError as error:
            raise Refused(409, f"{name} in {self.folder} is damaged: {error}", "restore it from a backup") from error

    def _stamp(self, role: str, md: Metadata[Any]) -> None:
        md.signed.version = self._version(role) + 1
        now = datetime.fromtimestamp(self._clock(), UTC).replace(microsecond=0)
        md.signed.expires = now + timedelta(days=DAYS.get(role, ROLE_DAYS))

    def _write(self, role: str, md: Metadata[Any], signers: Sequence[CryptoSigner]) -> None:
        self._stamp(role, md)
        md.signatures.clear()
        for one in signers:
            md.sign(one, append=True)
        self._put(role, md)

    def _put(self, role: str, md: Metadata[Any]) -> None:
        name = "timestamp.json" if role == "timestamp" else f"{md.signed.version}.{role}.json"
        durable.write(self._metadata / name, md.to_bytes(_SERIALIZER))
        if role not in ("root", "timestamp"):
            (self._metadata / f"{md.signed.version - KEPT}.{role}.json").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
