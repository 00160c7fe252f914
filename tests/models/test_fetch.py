"""Fetching: what `fetch` returns is the pinned file, or a clear error and nothing half-made."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models.errors import ModelError
from models.fetch import atomic_file, default_cache, fetch, sources

DATA = bytes(range(256)) * 2000


def _table(tmp_path: Path, data: bytes = DATA, package: str = "no-such-package") -> Path:
    table = tmp_path / "sources.toml"
    sha256 = hashlib.sha256(data).hexdigest()
    table.write_text(
        f'[m]\nkind = "onnx"\npackage = "{package}"\nversion = "1"\nwheel = "m-1-py3-none-any.whl"\n'
        f'license = "X"\norigin = "here"\n[[m.files]]\n'
        f'member = "m/model.onnx"\nsize = {len(data)}\nsha256 = "{sha256}"\n'
    )
    return table


def _wheel(cache: Path, data: bytes = DATA, member: str = "m/model.onnx") -> Path:
    wheel = cache / "wheels" / "m-1-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
    return wheel


def test_shipped_table_pins_every_file_by_hash() -> None:
    table = sources()
    assert set(table) >= {
        "smollm2",
        "ppocr-det",
        "ppocr-rec",
        "silero-vad",
        "efficientnet-lite0",
        "digits",
        "minilm",
        "objects",
    }
    for source in table.values():
        assert source.license in ("Apache-2.0", "MIT", "CC-BY-4.0")
        assert all(len(file.sha256) == 64 and file.size > 0 for file in source.files)


def test_pinned_file_is_extracted_once_and_then_found(tmp_path: Path) -> None:
    table, wheel = _table(tmp_path), _wheel(tmp_path)
    seen: list[tuple[str, int, int]] = []
    path = fetch("m", tmp_path, lambda *step: seen.append(step), table)
    assert path.read_bytes() == DATA
    assert seen[-1] == ("extracting model.onnx", len(DATA), len(DATA))
    wheel.unlink()
    assert fetch("m", tmp_path, table=table) == path


@pytest.mark.parametrize("other", [DATA[:-1], DATA + b"!", DATA[:-1] + b"\0", b""])
def test_other_bytes_are_refused_with_both_hashes_and_deleted(tmp_path: Path, other: bytes) -> None:
    table, wheel = _table(tmp_path), _wheel(tmp_path, other)
    with pytest.raises(ModelError) as caught:
        fetch("m", tmp_path, table=table)
    assert hashlib.sha256(DATA).hexdigest() in caught.value.message
    assert "found" in caught.value.message
    assert not wheel.exists()
    assert list((tmp_path / "models/m").iterdir()) == []


def test_cached_file_that_changed_is_made_again(tmp_path: Path) -> None:
    table, _ = _table(tmp_path), _wheel(tmp_path)
    path = fetch("m", tmp_path, table=table)
    path.write_bytes(DATA[:-1] + b"\0")
    assert fetch("m", tmp_path, table=table).read_bytes() == DATA


def test_wheel_without_the_member_is_refused(tmp_path: Path) -> None:
    table, wheel = _table(tmp_path), _wheel(tmp_path, member="m/other")
    with pytest.raises(ModelError, match=r"model\.onnx is not the pinned file"):
        fetch("m", tmp_path, table=table)
    assert not wheel.exists()


def test_no_network_says_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(ModelError) as caught:
        fetch("m", tmp_path, table=_table(tmp_path))
    assert "could not download no-such-package==1" in caught.value.message
    assert "check the network" in caught.value.hint
    assert list((tmp_path / "wheels").iterdir()) == []


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="known: digits, efficientnet-lite0, minilm, objects, ppocr-det, ppocr-rec"):
        fetch("nope", tmp_path)


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit in a process of its own stands for the full disk."""
    table, _ = _table(tmp_path), _wheel(tmp_path)
    code = (
        "import sys; from pathlib import Path; from models.fetch import fetch\n"
        "fetch('m', Path(sys.argv[1]), table=Path(sys.argv[2]))"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(table)],
        preexec_fn=limit, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "OUTRIDER_CACHE" in done.stderr
    assert list((tmp_path / "models/m").iterdir()) == []


def test_file_that_is_not_kept_vanishes(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_file(tmp_path / "x") as (stream, keep):
            stream.write(b"half")
            keep()
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_half()
    with atomic_file(tmp_path / "x") as (stream, _keep):
        stream.write(b"never kept")
    assert list(tmp_path.iterdir()) == []


def test_cache_is_the_users_unless_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTRIDER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/outrider")
    monkeypatch.setenv("OUTRIDER_CACHE", "/y")
    assert default_cache() == Path("/y")
