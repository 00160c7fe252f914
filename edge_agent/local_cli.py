"""The verbs that ask a device's local API: `outrider task`, `replay` and `update`.

Invariants: as cli.py has them; who may do what is decided by the device, by the token's grants.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import httpx
import msgspec
import typer
from typer.core import TyperGroup

from edge_agent.agent import shown
from edge_agent.agent.transcript import Task
from edge_agent.errors import Refused, Retry
from edge_agent.sync.https import problem


class _Tasks(TyperGroup):
    """`outrider task TEXT` is `outrider task run TEXT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = not args or args[0] == "--help" or args[0] in self.commands
        return super().parse_args(ctx, args if known else ["run", *args])


task = typer.Typer(cls=_Tasks, no_args_is_help=True, help="Give a device a task, and approve its dangerous calls.")
API = "http://127.0.0.1:8471"
Api = Annotated[str, typer.Option(envvar="OUTRIDER_API", help="The device's local API.", show_default=False)]
Token = Annotated[
    str, typer.Option(envvar="OUTRIDER_TOKEN", help="Access token from the hub's /v1/login.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@task.command()
def approve(
    id: Annotated[str, typer.Argument(help="The task that waits.")],
    deny: Annotated[bool, typer.Option("--deny", help="Say no.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
    api: Api = API,
    token: Token = "",
    json: Annotated[bool, typer.Option("--json", help="Print the call that was approved or denied.")] = False,
) -> None:
    """Show the call that a task waits with, and approve or deny it, once."""
    _sure(yes, json)
    with _client(api, token) as client:
        seen = _answer(client, "GET", f"/v1/tasks/{id}")
        ask = seen["steps"][-1] if seen["steps"] else {}
        if ask.get("role") != "ask":
            raise Refused(f"{id} waits for no approval: it is {seen['state']}", "GET /v1/tasks shows which do")
        if not json:
            typer.echo(f"{seen['subject']['name']} asked: {seen['text']}")
            plan = (n for n, each in enumerate(seen["steps"]) if each["role"] == "plan" and each.get("at"))
            _show_steps(seen, next(plan, len(seen["steps"]) - 1))
        if not yes:
            typer.confirm("deny it?" if deny else "approve it?", abort=True)
        args = {"id": id, "call": ask["text"], "approve": not deny}
        _answer(client, "POST", "/v1/tools/approve_call", json={"args": args})
    if json:
        typer.echo(msgspec.json.encode(args | {"expires": ask["expires"], "made": ask["call"]}))


def _sure(yes: bool, json: bool) -> None:
    if json and not yes:  # nothing but JSON is printed, so there would be a question about what nobody sees
        raise Refused("--json shows no call and asks no question", "add --yes")


@task.command()
def undo(
    id: Annotated[str, typer.Argument(help="The task that has ended.")],
    step: Annotated[int | None, typer.Option(help="Only this step of its transcript.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """Take what a task did back, the last first, where its tools say how; each once."""
    _sure(yes, json)
    args: dict[str, Any] = {"id": id} | ({} if step is None else {"step": step})
    with _client(api, token) as client:
        found = _answer(client, "POST", "/v1/tools/undo_task", json={"args": args | {"look": True}})["result"]
        if not json:
            typer.echo("\n".join(f"{each['step']}: {each['call']}" for each in found["undone"]))
        if not yes:
            typer.confirm("take it back?", abort=True)
        found = _answer(client, "POST", "/v1/tools/undo_task", json={"args": args})["result"]
    for each in [] if json else found["undone"]:
        typer.echo(f"{each.get('by', each['call'])}: {each.get('result', 'not reached')}")
    if json:
        typer.echo(msgspec.json.encode(found))


@task.command()
def cancel(
    id: Annotated[str, typer.Argument(help="The task, or run of a workflow, that waits or runs.")],
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """End a task before its time: one that runs stops after the step it is at, what it did stays done."""
    found = _ask(api, token, "POST", "/v1/tools/cancel_task", {"args": {"id": id}})["result"]
    typer.echo(msgspec.json.encode(found) if json else f"{id}: {found['state']}")


@task.command("list")
def list_(
    state: Annotated[str, typer.Option(help="Only those: running, waiting, succeeded or failed.")] = "",
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """The newest tasks of a device, and how each ended."""
    seen = [one for one in _ask(api, token, "GET", "/v1/tasks") if state in ("", one["state"])]
    if json:
        typer.echo(msgspec.json.encode(seen))
    for one in [] if json else seen:
        typer.echo(shown.title(msgspec.convert(one, Task)))


@task.command()
def show(
    id: Annotated[str, typer.Argument(help="The task.")],
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """A task's whole transcript: what was said, called, asked and approved, by what model, and how long it took."""
    seen = _ask(api, token, "GET", f"/v1/tasks/{id}")
    if json:
        typer.echo(msgspec.json.encode(seen))
        return
    typer.echo(shown.title(msgspec.convert(seen, Task)))
    _show_steps(seen, 0)
    _show_end(seen)


def _client(api: str, token: str, timeout: float = 10) -> Any:
    base = api if "://" in api else f"http://{api}"
    if not token:
        raise Refused("the device asks who you are", "--token, or OUTRIDER_TOKEN: `outrider hub token` prints yours")
    return httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}, timeout=timeout)


@task.command()
def run(
    text: Annotated[str, typer.Argument(help="What to do, in plain words.")],
    conversation: Annotated[str, typer.Option(help="Go on with what was said under this name.")] = "",
    api: Api = API,
    token: Token = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end.")] = 180.0,
    json: Annotated[bool, typer.Option("--json", help="Print the task with its transcript at the end.")] = False,
) -> None:
    """Give a device a task and show its calls as they are made; exits 1 when it failed."""
    with _client(api, token) as client:
        id = _answer(client, "POST", "/v1/tasks", json={"text": text, "conversation": conversation})["id"]
        told, deadline = 0, time.monotonic() + timeout
        while True:
            seen = _answer(client, "GET", f"/v1/tasks/{id}")
            if not json:
                told = _show_steps(seen, told)
            if seen["state"] not in ("running", "waiting"):
                break
            if time.monotonic() > deadline:
                raise Retry(f"task {id} is not done after {timeout:g} s", "it goes on; ask for it with GET /v1/tasks")
            time.sleep(0.1)
    if json:
        typer.echo(msgspec.json.encode(seen))
    else:
        _show_end(seen)
    raise typer.Exit(seen["state"] != "succeeded")


def replay(
    id: Annotated[str, typer.Argument(help="A task that has ended.")],
    model: Annotated[str, typer.Option(help="MODEL or MODEL:ADAPTER; without it, what speaks now.")] = "",
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """Ask a task's decisions again, of another model: nothing is done, results are the transcript's; exits 1 if one
    differs."""
    with _client(api, token, 600) as client:
        seen = _answer(client, "POST", f"/v1/tasks/{id}/replay", json={"model": model})
    made = seen["decisions"]
    if json:
        typer.echo(msgspec.json.encode(seen))
    for each in [] if json else made:
        typer.secho(f"{each['n']:>3} {each['role']:<6} {each['said']}  {each['ms']:.0f} ms")
        if not each["same"]:
            typer.secho(f"    differs: {each['says']}", fg="yellow", nl=False)
            typer.echo(f"  {each['ms_now']:.0f} ms")
    if not json:
        typer.echo(f"{seen['model'] or seen['digest'][:12]} {seen['adapter']}: {seen['same']} of {len(made)} the same")
    raise typer.Exit(seen["same"] < len(made))


update = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@update.command("show")
def update_show(api: Api = API, token: Token = "", json: Json = False) -> None:
    """Each bundle's state, what its trial saw, and the evidence against one that rolled back."""
    _tell_updates(_ask(api, token, "GET", "/v1/updates"), json)


@update.command("hold")
def update_hold(
    minutes: Annotated[float, typer.Option(help="How long at most; the device's limit goes before it.")],
    reason: Annotated[str, typer.Option(help="Why not now; the hub sees it.")],
    api: Api = API,
    token: Token = "",
    json: Json = False,
) -> None:
    """Nothing is downloaded or activated for some minutes; what runs goes on."""
    _tell_updates({"hold": _ask(api, token, "POST", "/v1/updates/hold", {"minutes": minutes, "reason": reason})}, json)


@update.command("release")
def update_release(api: Api = API, token: Token = "", json: Json = False) -> None:
    """End a hold."""
    _tell_updates(_ask(api, token, "DELETE", "/v1/updates/hold"), json)


def _ask(api: str, token: str, method: str, path: str, body: Any = None) -> Any:
    with _client(api, token) as client:
        return _answer(client, method, path, json=body)


def _tell_updates(seen: dict[str, Any], json: bool) -> None:
    if json:
        typer.echo(msgspec.json.encode(seen))
        return
    if (hold := seen.get("hold")) and hold["until"] > time.time():
        typer.echo(f"held until {time.strftime('%H:%M', time.localtime(hold['until']))}: {hold['reason']}")
    for name, one in seen.get("bundles", {}).items():
        typer.echo(f"{name} {one['version']}: {one['state']}" + (f": {one['error']}" if one["error"] else ""))
        if one["trial"]:
            typer.echo("  trial: " + _figures(one["trial"]))
        if why := one["why"]:
            typer.echo(f"  {why['version']} rolled back: " + _figures(why["figures"]))
            for line in [*why["samples"], *why["log"][-10:]]:
                typer.echo(f"    {line}")


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items() if value not in (None, ""))


def _show_steps(seen: dict[str, Any], first: int) -> int:
    task = msgspec.convert(seen, Task)
    for step in task.steps[first:]:
        text, tone = shown.line(step, task)
        typer.secho(text, fg={"bad": "red", "wait": "yellow"}.get(tone, "cyan" if step.role == "model" else None))
    return len(task.steps)


def _show_end(seen: dict[str, Any]) -> None:
    if seen["state"] == "succeeded":
        typer.secho(seen["answer"], fg="green")
        typer.echo(f"from {'; '.join(seen['sources'])}" if seen.get("sources") else "", nl=bool(seen.get("sources")))
    elif seen["state"] == "waiting":
        typer.secho(f"it waits: outrider task approve {seen['id']}", fg="yellow")
    elif seen["state"] == "failed":
        typer.secho(f"failed: {seen['error']}", fg="red")


def _answer(client: Any, method: str, path: str, **more: Any) -> Any:
    try:
        response = client.request(method, path, **more)
    except httpx.HTTPError as error:
        raise Retry(f"no answer from {client.base_url}: {error}", "is `outrider agent` running there?") from error
    if response.is_error:
        raise (Retry if response.status_code in (429, 503) else Refused)(*problem(response))
    return response.json()
