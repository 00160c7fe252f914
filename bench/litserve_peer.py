"""LitServe with a network of ours, as its documentation builds a server: batching on, raw bytes in and out.

Invariants: the same model file and threads as ours; a request is the tensor's bytes with no JSON around them, which is
the least that LitServe can be asked to read. Pictures of different widths run together as LitServe's `batch` asks for
it: padded with grey (zeros) to the widest, and each answer cut to its own width again.
"""

import sys
from typing import Annotated, Any

import litserve
import litserve.server
import numpy as np
import onnxruntime
from fastapi import Depends, Request, Response


async def body(request: Request) -> bytes:
    return await request.body()


Body = Annotated[bytes, Depends(body)]


class Network(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """One network that takes pictures of so many planes, so high."""

    def __init__(self, path: str, planes: int, height: int, threads: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.002)
        self._path, self._threads, self._form = path, threads, (planes, height, -1)

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: Body) -> np.ndarray:
        return np.frombuffer(request, np.float32).reshape(self._form)

    def batch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
        widths = [x.shape[2] for x in inputs]
        if len(set(widths)) == 1:
            return np.stack(inputs), widths
        x = np.zeros((len(inputs), *self._form[:2], max(widths)), np.float32)
        for row, one in enumerate(inputs):
            x[row, :, :, : one.shape[2]] = one
        return x, widths

    def predict(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):  # without batches there is no `batch`
            return list(self._session.run(None, {"x": x[None]}))
        return self._session.run(None, {"x": x[0]}), x[1]

    def unbatch(self, output: Any) -> list[list[np.ndarray]]:
        values, widths = output
        if len(set(widths)) == 1:
            return [[value[row : row + 1] for value in values] for row in range(len(widths))]
        steps = [-(-width // 4) // 2 for width in widths]  # that the label reader makes of a width
        return [[value[row : row + 1, :count] for value in values] for row, count in enumerate(steps)]

    def encode_response(self, output: list[np.ndarray]) -> Response:
        return Response(b"".join(value.tobytes() for value in output), media_type="application/octet-stream")


def main(path: str, *numbers: str) -> None:
    planes, height, threads, workers, batch, port = map(int, numbers)
    litserve.server._MCP_AVAILABLE = False  # 0.2.19 takes the package `mcp` for `fastmcp`, and does not start without
    api: Any = Network(path, planes, height, threads, batch)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=workers).run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="error"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
