"""`outrider trust`: the ceremonies of the TUF repository, on the hub's machine or on a copy of its `trust` folder.

Invariant: offline keys are read where they are and copied nowhere; each step shows what is drafted and signed.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from securesystemslib.signer import Key, SSlibKey

from hub.errors import Refused
from hub.repository import Repository, load_key, make_key

app = typer.Typer(no_args_is_help=True, help="Whom devices trust: key ceremonies of the hub's TUF repository.")
Data = Annotated[Path, typer.Option(help="The hub's data directory.")]
Signing = Annotated[list[Path], typer.Option("--sign", help="An offline key to sign with, once for each.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command()
def key(file: Annotated[Path, typer.Argument(help="Where the new key goes.")], as_json: AsJson = False) -> None:
    """Make an offline key; its public half lies beside it as FILE.pub."""
    public = make_key(file).public_key
    file.with_name(f"{file.name}.pub").write_bytes(msgspec.json.encode({"keyid": public.keyid} | public.to_dict()))
    _say({"key": str(file), "keyid": public.keyid}, as_json)


@app.command()
def ceremony(
    data: Data,
    keys: Annotated[list[Path], typer.Option("--key", help="An offline key, once for each.")],
    threshold: Annotated[int, typer.Option(help="How many of them change whom devices trust.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Make the repository of a hub that has none, with offline keys of your own."""
    repository = Repository(data / "trust")
    repository.create([load_key(path) for path in keys], threshold, {"bundles": ["bundles/*/*/*"]})
    _say(repository.show(), as_json)


@app.command()
def rotate(
    data: Data,
    sign: Signing,
    keys: Annotated[
        list[Path] | None, typer.Option("--key", help="A public (.pub) or private key of the new set.")
    ] = None,
    threshold: Annotated[int, typer.Option(help="The new threshold; 0 leaves it.")] = 0,
    online: Annotated[bool, typer.Option(help="New snapshot and timestamp keys: after a hub was broken into.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draft a root with other keys, or the same with a new life, and sign it."""
    Repository(data / "trust").rotate([_public(path) for path in keys or []], threshold, online)
    _sign(data, "root", sign, as_json)


@app.command()
def prolong(data: Data, sign: Signing, as_json: AsJson = False) -> None:
    """Draft the same targets with a new life, and sign them."""
    Repository(data / "trust").prolong()
    _sign(data, "targets", sign, as_json)


@app.command()
def delegate(
    data: Data,
    role: Annotated[str, typer.Argument(help="The role's name.")],
    paths: Annotated[list[str], typer.Option("--path", help="What it alone signs, such as 'bundles/ocr-*/*/*'.")],
    sign: Signing,
    public: Annotated[
        Path | None, typer.Option("--key", help="Its key; a new one is made at the hub if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draft that some models are signed by a role of their own, and sign it; the same role again gets a new key."""
    Repository(data / "trust").delegate(role, paths, _public(public) if public else None)
    _sign(data, "targets", sign, as_json)


@app.command("sign")
def sign_draft(
    data: Data,
    role: Annotated[str, typer.Argument(help="root or targets")],
    sign: Signing,
    as_json: AsJson = False,
) -> None:
    """Add signatures to a draft; the last one that it needs makes it current."""
    _sign(data, role, sign, as_json)


@app.command()
def show(data: Data, as_json: AsJson = False) -> None:
    """Roles, versions, expiry, thresholds, delegations, drafts."""
    _say(Repository(data / "trust").show(), as_json)


@app.command(
    "conformance-client",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def conformance_client(rest: Annotated[list[str], typer.Argument()]) -> None:
    """The device's TUF client, as the public tuf-conformance suite calls it."""
    os.execv(sys.executable, [sys.executable, "-m", "edge_agent.update.conformance", *rest])


def _sign(data: Path, role: str, keys: list[Path], as_json: bool) -> None:
    repository = Repository(data / "trust")
    for path in keys:
        repository.sign(role, load_key(path))
    _say(repository.show(), as_json)


def _public(path: Path) -> Key:
    try:
        given: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        return SSlibKey.from_dict(given.pop("keyid"), given)
    except (OSError, msgspec.DecodeError):
        return load_key(path).public_key
    except (KeyError, ValueError, TypeError) as error:
        raise Refused(422, f"{path} is no public key: {error}", "outrider trust key makes FILE and FILE.pub") from error


def _say(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(found).decode())
        return
    console = Console()
    for name, value in found.items():
        if name != "roles":
            console.print(f"{name}: {value}")
            continue
        table = Table("role", "version", "expires", "keys")
        for role, it in value.items():
            short = ", ".join(keyid[:8] for keyid in it["keys"])
            table.add_row(role, str(it["version"]), it["expires"][:16], f"{it['threshold']} of {short}")
        console.print(table)
