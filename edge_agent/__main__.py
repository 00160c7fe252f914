"""The daemon's process: `python -m edge_agent FD`, started by `outrider agent` in its own place (execve).

Invariant: the settings come through a pipe, so that no token stands in a command line or an environment; nothing the
command line imported is in this process, and what only workers may hold cannot be imported here at all.
"""

import os
import sys

import msgspec

for _name in ("numpy", "pandas", "pydantic", "onnxruntime", "onnxruntime_genai"):
    sys.modules[_name] = None  # type: ignore[assignment]  # sqlite-utils takes numpy and pandas where it finds them
sys.modules["httpx._main"] = None  # type: ignore[assignment]  # its command line, which brings rich: 3 MiB


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
