"""LitServe with a network of ours, as its documentation builds a server: batching on, raw bytes in and out.

Invariants: the same model file, session options, threads and largest batch as ours; a request is the tensor's bytes
with no JSON around them, which is the least that LitServe can be asked to read.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import onnxruntime
from fastapi import Depends, Request, Response


async def body(request: Request) -> bytes:
    return await request.body()


Body = Annotated[bytes, Depends(body)]


class Network(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """One network; `shape` is that of a row."""

    def __init__(self, path: str, shape: list[int], threads: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.002)
        self._path, self._shape, self._threads = path, shape, threads

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: Body) -> np.ndarray:
        return np.frombuffer(request, np.float32).reshape(self._shape)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[np.ndarray]:
        return list(self._session.run(None, {"x": x}))

    def unbatch(self, output: list[np.ndarray]) -> list[list[np.ndarray]]:
        return [[value[row : row + 1] for value in output] for row in range(len(output[0]))]

    def encode_response(self, output: list[np.ndarray]) -> Response:
        return Response(b"".join(value.tobytes() for value in output), media_type="application/octet-stream")


def main(path: str, shape: str, threads: str, batch: str, port: str) -> None:
    api: Any = Network(path, [int(n) for n in shape.split(",")], int(threads), int(batch))
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=int(port), generate_client_file=False, log_level="error"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
