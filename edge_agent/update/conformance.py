"""The device's TUF client as the public tuf-conformance suite calls it: exit code 0 or 1.

    python -m edge_agent.update.conformance --metadata-dir DIR (init ROOT | --metadata-url URL refresh |
        --metadata-url URL --target-name NAME --target-base-url URL --target-dir DIR download)

The updater, the fetcher and what they keep on disk are those of the daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import httpx
from tuf.api import exceptions as tuf

from edge_agent.update.download import Downloads
from edge_agent.update.trust import DurableUpdater, Fetcher
from edge_agent.wire import durable


async def run(given: argparse.Namespace) -> None:
    """Raises OSError, tuf.RepositoryError, tuf.DownloadError, ValueError."""
    async with httpx.AsyncClient(timeout=30) as client:
        fetcher = Fetcher(Downloads(client, str), asyncio.get_running_loop())
        await asyncio.to_thread(_update, given, fetcher)


def _update(given: argparse.Namespace, fetcher: Fetcher) -> None:
    updater = DurableUpdater(given.metadata_dir, given.metadata_url, fetcher, None)
    updater.refresh()
    if given.command == "download":
        target = updater.get_targetinfo(given.target_name)
        if target is None:
            raise ValueError(f"no target {given.target_name}")
        given.target_dir.mkdir(parents=True, exist_ok=True)
        updater.target_dir = str(given.target_dir)
        if updater.find_cached_target(target) is None:
            made = updater.download_target(target, target_base_url=given.target_base_url)
            durable.sync(Path(made))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="outrider trust conformance-client")
    for name in ("--metadata-dir", "--target-dir"):
        parser.add_argument(name, type=Path)
    for name in ("--metadata-url", "--target-name", "--target-base-url"):
        parser.add_argument(name)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    for command in ("refresh", "download"):
        commands.add_parser(command)
    given = parser.parse_args(arguments)
    try:
        if given.command == "init":
            given.metadata_dir.mkdir(parents=True, exist_ok=True)
            durable.write(given.metadata_dir / "root.json", given.root.read_bytes())
        else:
            asyncio.run(run(given))
    except (OSError, ValueError, tuf.RepositoryError, tuf.DownloadError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
