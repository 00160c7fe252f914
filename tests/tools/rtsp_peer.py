"""An RTSP server for the files of a folder, in a process of its own: `python -m tests.tools.rtsp_peer DIR PORT`."""

import asyncio
import sys

from aio_rtsp_toolkit import server

asyncio.run(server.serve(sys.argv[1], "127.0.0.1", int(sys.argv[2])))
