"""Grants, tokens and bundles: nothing untrusted is used, and nobody may do what no grant says."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import OKPKey

from edge_agent.wire.bundle import (
    BundleKind,
    Directive,
    FileEntry,
    Manifest,
    Sealed,
    Target,
    content_digest,
    decode_manifest,
    open_directive,
    open_root,
    scan,
    seal_directive,
    seal_root,
)
from edge_agent.wire.errors import BadSignature, Undecodable, VersionRefused
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed, public_jwk, sign_grants, verify_grants
from edge_agent.wire.messages import encode
from edge_agent.wire.signing import SigningKey, to_text
from edge_agent.wire.tokens import (
    device_of,
    issue_access_token,
    issue_device_token,
    verify_access_token,
    verify_device_token,
)

KEY = SigningKey.from_seed(bytes(range(32)))
OTHER = SigningKey.from_seed(bytes(32))
JWKS = [public_jwk(KEY.public)]
NOW = 1_800_000_000.0
GRANTS = Grants(5, NOW - 100, NOW + 1000, SHIPPED_ROLES, JWKS, {"eve": NOW - 10})


def test_grants_are_read_back_and_an_older_epoch_is_refused() -> None:
    text = sign_grants(KEY, GRANTS)
    assert verify_grants(KEY.public, text, known_epoch=5) == GRANTS
    with pytest.raises(Undecodable, match="older"):
        verify_grants(KEY.public, text, known_epoch=6)


def test_grants_of_another_key_or_version_or_type_are_refused() -> None:
    with pytest.raises(BadSignature):
        verify_grants(OTHER.public, sign_grants(KEY, GRANTS))
    with pytest.raises(VersionRefused):
        verify_grants(KEY.public, sign_grants(KEY, msgspec.structs.replace(GRANTS, v=2)))
    with pytest.raises(BadSignature):
        verify_grants(KEY.public, issue_access_token(KEY, "ann", ["admin"], now=NOW, lifetime_s=60))


@given(st.integers(0, 10_000))
def test_a_changed_character_of_signed_grants_is_refused(where: int) -> None:
    text = sign_grants(KEY, GRANTS)
    i = where % len(text)
    changed = text[:i] + ("A" if text[i] != "A" else "B") + text[i + 1 :]
    with pytest.raises((BadSignature, Undecodable)):
        verify_grants(KEY.public, changed)


def may(roles: list[str], action: str, resource: str = "", name: str = "ann", now: float = NOW) -> bool:
    return allowed(GRANTS, Subject(name, roles, NOW - 20), action, resource, now=now)


def test_a_role_may_do_what_its_permissions_say_and_nothing_else() -> None:
    assert may(["operator"], "call:tool", "set_speed")
    assert may(["viewer"], "read:device")
    assert not may(["viewer"], "call:tool", "set_speed")
    assert not may(["operator"], "publish:bundle")
    assert not may(["nobody"], "read:device")
    assert not may([], "read:device")
    assert may(["admin"], "manage:user")


def test_a_scope_narrows_a_permission() -> None:
    grants = msgspec.structs.replace(GRANTS, roles={"a": ["call:tool:set_*"]})
    ann = Subject("ann", ["a"], NOW)
    assert allowed(grants, ann, "call:tool", "set_speed", now=NOW)
    assert not allowed(grants, ann, "call:tool", "stop_line", now=NOW)
    assert not allowed(grants, ann, "call:tool", now=NOW)


@pytest.mark.parametrize(
    ("permission", "action", "resource", "device", "yes"),
    [
        ("run:task:group=line-2", "run:task", "", "press-1", True),
        ("run:task:group=line-2", "run:task", "", "press-9", False),
        ("run:task:group=line-2", "run:task", "", "", False),
        ("run:task:group=nobody", "run:task", "", "press-1", False),
        ("run:task:device=press-*", "run:task", "", "press-9", True),
        ("run:task:device=*", "run:task", "", "", False),
        ("run:task:press-1", "run:task", "", "press-1", True),
        ("run:task:press-1", "run:task", "press-1", "press-1", True),
        ("run:task:press-1", "run:task", "", "press-2", False),
        ("call:tool:press-1", "call:tool", "stop_line", "press-1", False),
        ("call:tool:group=line-2&tool=set_*", "call:tool", "set_speed", "press-1", True),
        ("call:tool:group=line-2&tool=set_*", "call:tool", "stop_line", "press-1", False),
        ("call:tool:group=line-2&tool=set_*", "call:tool", "set_speed", "press-9", False),
        ("run:model:model=ocr", "run:model", "ocr", "press-1", True),
        ("*:*:model=ocr", "call:tool", "ocr", "press-1", False),
        ("*:*:planet=mars", "call:tool", "ocr", "press-1", False),
        ("*:*:=", "call:tool", "ocr", "press-1", False),
    ],
)
def test_a_scope_names_devices_groups_tools_and_models(
    permission: str, action: str, resource: str, device: str, yes: bool
) -> None:
    signed = msgspec.structs.replace(GRANTS, roles={"a": [permission]}, groups={"line-2": ["press-1", "press-2"]})
    grants = verify_grants(KEY.public, sign_grants(KEY, signed))
    assert allowed(grants, Subject("ann", ["a"], NOW), action, resource, now=NOW, device=device) is yes


def test_what_a_revoked_subject_got_before_is_void_and_after_is_not() -> None:
    assert not may(["admin"], "read:device", name="eve")
    assert allowed(GRANTS, Subject("eve", ["admin"], NOW - 5), "read:device", now=NOW)


def test_past_hard_expiry_only_reading_remains() -> None:
    assert may(["admin"], "read:tool", now=NOW + 2000)
    assert not may(["admin"], "call:tool", now=NOW + 2000)


def test_an_access_token_says_who_and_is_refused_late_or_changed() -> None:
    token = issue_access_token(KEY, "ann", ["viewer"], now=NOW, lifetime_s=100)
    assert verify_access_token(JWKS, token, now=NOW) == Subject("ann", ["viewer"], NOW)
    for bad, at in [(token, NOW + 500), (token[:-2], NOW), ("", NOW), ("a.b.c", NOW), (token + "x", NOW)]:
        with pytest.raises(BadSignature):
            verify_access_token(JWKS, bad, now=at)
    with pytest.raises(BadSignature):
        verify_access_token([public_jwk(OTHER.public)], token, now=NOW)


@pytest.mark.parametrize("missing", ["iss", "sub", "aud", "exp", "iat", "jti", "roles"])
def test_every_claim_is_required(missing: str) -> None:
    claims = {"iss": "outrider-hub", "sub": "a", "aud": "outrider", "exp": int(NOW) + 9, "iat": int(NOW), "jti": "j"}
    claims["roles"] = ["admin"]
    del claims[missing]
    header = {"alg": "Ed25519", "typ": "at+jwt", "kid": KEY.public.key_id}
    token = jwt.encode(header, claims, OKPKey.import_key(KEY.key), algorithms=["Ed25519"])
    with pytest.raises(BadSignature):
        verify_access_token(JWKS, token, now=NOW)


def test_a_token_of_another_type_or_without_signature_is_refused() -> None:
    device = issue_device_token(KEY, "plant", "press-1", now=NOW)
    assert device_of(device) == "press-1"
    verify_device_token(KEY.public, device, fleet="plant", device="press-1", now=NOW)
    with pytest.raises(BadSignature):
        verify_access_token(JWKS, device, now=NOW)
    with pytest.raises(BadSignature):
        verify_device_token(KEY.public, device, fleet="plant", device="press-2", now=NOW)
    with pytest.raises(BadSignature):
        verify_access_token(JWKS, "eyJhbGciOiJub25lIn0." + device.split(".")[1] + ".", now=NOW)
    for noise in ("", "a", "a.!!.c", "a.bm90anNvbg.c"):
        with pytest.raises(BadSignature):
            device_of(noise)


@pytest.mark.parametrize("crit", [1, None, "b64", [1], [[]], {"b64": 1}, ["exp"]])
def test_a_header_that_makes_no_sense_is_refused_and_breaks_nothing(crit: object) -> None:
    """A retained one on the grants' topic, which no signature is needed for, would end every daemon at each start."""
    head = to_text(msgspec.json.encode({"alg": "Ed25519", "typ": "outrider-grants", "crit": crit}))
    text = f"{head}.{to_text(b'{}')}.{to_text(bytes(64))}"
    with pytest.raises(BadSignature):
        verify_grants(KEY.public, text)
    with pytest.raises(BadSignature):
        verify_access_token(JWKS, text, now=NOW)
    with pytest.raises(BadSignature):
        verify_device_token(KEY.public, text, fleet="plant", device="press-1", now=NOW)


def bundle(tmp_path: Path) -> Manifest:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"weights")
    (tmp_path / "sub" / "a.txt").write_bytes(b"text")
    return Manifest("net", "1.0", BundleKind.ONNX, scan(tmp_path))


def test_the_content_digest_knows_paths_and_contents_only(tmp_path: Path) -> None:
    manifest = bundle(tmp_path)
    digest = content_digest(manifest.files)
    assert digest == content_digest(reversed(manifest.files))
    (tmp_path / "model.onnx").write_bytes(b"weightz")
    assert content_digest(scan(tmp_path)) != digest


def test_a_directive_or_root_is_refused_when_changed_or_sealed_as_something_else(tmp_path: Path) -> None:
    directive = Directive("plant", "press-7", "", 1, 1.0, {"net": Target("1", "0" * 64)})
    sealed = seal_directive(KEY, directive)
    assert open_directive(KEY.public, sealed) == directive
    changed = Sealed(sealed.text.replace("press-7", "press-8"), sealed.signature)
    for key, wrong in [(KEY, changed), (OTHER, sealed), (KEY, seal_root(KEY, sealed.text.encode()))]:
        with pytest.raises(BadSignature):
            open_directive(key.public, wrong)
    with pytest.raises(BadSignature):
        open_root(KEY.public, sealed)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "", ".", "a//b", "a\\..\\b", ".hidden", "a\0b", "é"])
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        FileEntry(path, 1, "0" * 64)


def test_a_manifest_that_makes_no_sense_is_refused() -> None:
    for raw in (b"", b"{}", b'{"name":"a","version":"1","kind":"onnx","files":[]}'):
        with pytest.raises(Undecodable):
            decode_manifest(raw)
    raw = encode(Manifest("a", "1", BundleKind.ONNX, [FileEntry("x", 1, "0" * 64)])).replace(b"onnx", b"onyx")
    with pytest.raises(Undecodable, match="kind"):
        decode_manifest(raw)


def test_a_key_is_kept_for_its_owner_alone_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key = SigningKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load_or_create(path).public.text == key.public.text
