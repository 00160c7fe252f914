"""Databases and hubs for the hub's tests."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hub.db import Database
from tests.hub.browser import Browser, browser, serving
from tests.hub.rig import Hub, running

PG_BIN = Path("/usr/lib/postgresql")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a private PostgreSQL on a Unix socket; skips where there is no server, driver or user to run it."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    found = sorted(PG_BIN.glob("*/bin/initdb"))
    if not found:
        pytest.skip(f"no PostgreSQL server below {PG_BIN}")
    user = pwd.getpwuid(os.getuid()).pw_name
    if os.getuid() == 0:
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            pytest.skip("PostgreSQL refuses to run as root and there is no user postgres")
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if as_user:
        shutil.chown(folder, user, user)
    binaries, data = found[-1].parent, folder / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    subprocess.run([*as_user, binaries / "initdb", "-D", data, "-A", "trust", "-U", "outrider"], **quiet)
    control = [*as_user, binaries / "pg_ctl", "-D", data, "-w"]
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], **quiet)
    yield f"postgresql+psycopg://outrider@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hub.db'}"
    url: str = request.getfixturevalue("postgresql")
    import sqlalchemy as sa

    name = f"t{os.urandom(6).hex()}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    db = Database(database_url)
    yield db
    db.close()


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    """A hub with its embedded broker, in this process."""
    async with running(tmp_path / "hub") as started:
        yield started


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Hub, str]]:
    async with serving(tmp_path / "hub") as started:
        yield started


@pytest.fixture
async def window(tmp_path: Path) -> AsyncIterator[Browser]:
    async with browser(tmp_path / "profile") as opened:
        await opened.look(1280, 900)
        yield opened
