"""The daemon's process: `python -m edge_agent FD`, started by `outrider agent` in its own place (execve).

Invariant: the settings come through a pipe, so that no token stands in a command line or an environment; nothing the
command line imported is in this process, and what only workers may hold cannot be imported here at all.
"""

import os
import sys
from types import ModuleType

import msgspec

for _name in ("numpy", "pandas", "pydantic", "onnxruntime", "onnxruntime_genai"):
    sys.modules[_name] = None  # type: ignore[assignment]
for _name in ("httpx._main", "brotli", "brotlicffi", "watchfiles", "python_multipart", "multipart"):
    sys.modules[_name] = None  # type: ignore[assignment]  # taken by httpx, uvicorn and starlette where it is found: 5 MiB
_fetcher = sys.modules["tuf.ngclient.urllib3_fetcher"] = ModuleType("not used here: it brings urllib3")
_fetcher.Urllib3Fetcher = type("Urllib3Fetcher", (), {})  # type: ignore[attr-defined]


def main() -> None:
    """Run the daemon with the settings in the pipe FD."""
    from edge_agent import daemon
    from edge_agent.config import Settings, as_path
    from edge_agent.errors import OutriderError
    from edge_agent.exits import tell
    from edge_agent.wire.errors import WireError

    with os.fdopen(int(sys.argv[1]), "rb") as pipe:
        settings = msgspec.json.decode(pipe.read(), type=Settings, dec_hook=as_path)
    try:
        daemon.main(settings)
    except (OutriderError, WireError) as error:
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
