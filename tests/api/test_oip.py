"""Networks through the Open Inference Protocol: known clients get the engine's own answers, and errors that help."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from edge_agent.api import tensors
from edge_agent.api.app import create_app
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Refused
from edge_agent.update import probe
from edge_agent.update.slots import Installed
from edge_agent.wire.tensor import Tensor
from models.package import package
from tests.api.serving import Served, bearer, installed, serving
from tests.serving.test_supervisor import until

REC = "ppocr-rec"
SMALL = np.linspace(-1, 1, 3 * 48 * 64, dtype=np.float32).reshape(1, 3, 48, 64)


@pytest.fixture(scope="module")
def rec(model_cache: Path) -> Installed:
    bundle, _ = package(REC, model_cache)
    return installed(bundle)


@pytest.fixture
async def device(rec: Installed) -> AsyncIterator[Served]:
    async with serving(rec, max_body=1 << 20) as made:
        yield made


class Bearer(triton.InferenceServerClientPlugin):  # type: ignore[misc]
    """The token, as tritonclient takes it."""

    def __init__(self, *roles: str) -> None:
        self._headers = bearer(*roles)

    def __call__(self, request: Any) -> None:
        request.headers.update(self._headers)


async def ask(device: Served, do: Callable[[triton.InferenceServerClient], Any], *roles: str) -> Any:
    """What tritonclient gets; it blocks, so it has a thread."""

    def call() -> Any:
        with triton.InferenceServerClient(device.host) as client:
            client.register_plugin(Bearer(*roles))
            return do(client)

    return await asyncio.to_thread(call)


def given(array: np.ndarray, binary: bool = True, name: str = "x", datatype: str = "FP32") -> list[Any]:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return [tensor]


def _infer(inputs: list[Any], client: triton.InferenceServerClient, **more: Any) -> Any:
    return client.infer(REC, inputs, **more)


async def curl(*args: str) -> tuple[int, str]:
    command = ["curl", "-s", "-w", "\n%{http_code}", "--max-time", "60", *args]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    body, _, status = (await process.communicate())[0].decode().rpartition("\n")
    return int(status), body


async def test_tritonclient_gets_the_engines_own_answer_in_every_mix_of_json_and_binary(
    device: Served, rec: Installed
) -> None:
    golden = probe.golden(rec)
    assert golden is not None
    array = np.frombuffer(golden.inputs["x"].data, np.float32).reshape(golden.inputs["x"].shape)
    wanted = OnnxNetwork(rec.folder).infer(golden.inputs)
    for way in (True, False):
        for asked in (None, True, False):
            names = [] if asked is None else list(reversed(wanted))
            outputs = [triton.InferRequestedOutput(name, binary_data=asked) for name in names] or None
            infer = functools.partial(_infer, given(array, way), outputs=outputs, request_id="7")
            found = await ask(device, infer)
            for name, tensor in wanted.items():
                assert found.as_numpy(name).astype(tensor.dtype).tobytes() == tensor.data
            response = found.get_response()
            assert (response["model_name"], response["model_version"], response["id"]) == (
                REC,
                rec.manifest.version,
                "7",
            )
            assert [o["name"] for o in response["outputs"]] == names or list(wanted)
    one = [triton.InferRequestedOutput("codepoint")]
    found = await ask(device, lambda c: c.infer(REC, given(array), outputs=one, model_version=rec.manifest.version))
    assert [o["name"] for o in found.get_response()["outputs"]] == ["codepoint"]


async def test_a_large_answer_goes_out_as_it_lies_in_shared_memory_which_is_free_then(model_cache: Path) -> None:
    det = installed(package("ppocr-det", model_cache)[0])
    array = np.random.default_rng(1).uniform(-1, 1, (1, 3, 160, 320)).astype(np.float32)
    wanted = OnnxNetwork(det.folder).infer({"x": Tensor("float32", list(array.shape), array.tobytes())})
    async with serving(det) as device:
        await asyncio.sleep(0.2)  # it listens then
        for _ in range(3):
            found = await ask(device, lambda c: c.infer("ppocr-det", given(array)))
            for name, tensor in wanted.items():
                assert len(tensor.data) == 160 * 320 * 4
                np.testing.assert_allclose(
                    found.as_numpy(name).ravel(), np.frombuffer(tensor.data, np.float32), atol=1e-4
                )
        arena = device.models.workers["network"]._arena
        assert arena is not None
        assert arena.take({"x": Tensor("uint8", [1 << 26], bytes(1 << 26))}) == (0, 1 << 26)


async def test_tritonclient_reads_health_and_metadata(device: Served, rec: Installed) -> None:
    version = rec.manifest.version
    assert await ask(device, lambda c: c.is_server_live() and c.is_server_ready() and c.is_model_ready(REC))
    assert await ask(device, lambda c: c.is_model_ready(REC, version))
    assert not await ask(device, lambda c: c.is_model_ready(REC, "1"))
    assert (await ask(device, lambda c: c.get_server_metadata()))["extensions"] == ["binary_tensor_data"]
    shown = await ask(device, lambda c: c.get_model_metadata(REC, version))
    assert shown["versions"] == [version]
    assert shown["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 48, -1]}]
    assert [(o["name"], o["datatype"]) for o in shown["outputs"]] == [("codepoint", "INT32"), ("confidence", "FP32")]


async def test_tritonclient_shows_what_to_mend(device: Served) -> None:
    cases: list[tuple[str, str, Callable[[triton.InferenceServerClient], Any]]] = [
        ("404", "no network nothing.*ppocr-rec", lambda c: c.infer("nothing", given(SMALL))),
        ("404", "no version 1 .*of version", lambda c: c.infer(REC, given(SMALL), model_version="1")),
        ("400", "model takes x: float32", lambda c: c.infer(REC, given(SMALL, name="y"))),
        ("400", "model takes x: float32", lambda c: c.infer(REC, given(SMALL[0]))),
        ("400", "x is float64", lambda c: c.infer(REC, given(SMALL.astype(np.float64), datatype="FP64"))),
        ("400", "classification is not", lambda c: c.infer(
            REC, given(SMALL), outputs=[triton.InferRequestedOutput("codepoint", class_count=3)])),
        ("400", "no output y .*codepoint, confidence", lambda c: c.infer(
            REC, given(SMALL), outputs=[triton.InferRequestedOutput("y")])),
        ("415", "gzip", lambda c: c.infer(REC, given(SMALL), request_compression_algorithm="gzip")),
        ("413", "larger than 1048576 bytes", lambda c: c.infer(REC, given(np.zeros((1, 3, 48, 9999), np.float32)))),
    ]  # fmt: skip
    for status, says, do in cases:
        with pytest.raises(InferenceServerException, match=says) as caught:
            await ask(device, do)
        assert caught.value.status() == status, says
    with pytest.raises(InferenceServerException, match=r"ada may not run:model ppocr-rec.*viewer"):
        await ask(device, lambda c: c.infer(REC, given(SMALL)), "viewer")
    assert (await ask(device, lambda c: c.get_model_metadata(REC), "viewer"))["name"] == REC


async def test_curl_infers_and_is_told_what_is_wrong(device: Served, tmp_path: Path) -> None:
    auth, url = ["-H", f"Authorization: {bearer()['Authorization']}"], f"{device.url}/v2/models/{REC}/infer"
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3, 48, 64], "data": SMALL.tolist()}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    status, body = await curl(*auth, url, "--data-binary", f"@{tmp_path / 'request.json'}")
    assert status == 200
    assert [o["name"] for o in json.loads(body)["outputs"]] == ["codepoint", "confidence"]
    (tmp_path / "large").write_bytes(bytes(80 << 20))
    for chunked in ([], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]):
        status, body = await curl(*auth, *chunked, url, "--data-binary", f"@{tmp_path / 'large'}")
        assert (status, json.loads(body)) == (413, {"error": "the body is larger than 1048576 bytes (send less)"})
    assert await curl(f"{device.url}/v2/health/ready") == (200, '{"ready":true}')
    assert (await curl(url, "-d", "{}"))[0] == 401
    status, body = await curl(*auth, f"{device.url}/v2/nowhere")
    assert status == 404
    assert "Not Found" in json.loads(body)["error"]


async def test_bodies_that_are_held_at_one_time_are_bounded_and_given_back(device: Served) -> None:
    go, url, taken, large = asyncio.Event(), f"/v2/models/{REC}/infer", asyncio.Queue[None](), b" " * 900_000

    async def stalled() -> AsyncIterator[bytes]:
        yield large
        taken.put_nowait(None)
        await go.wait()
        yield b"{}"

    app = httpx.ASGITransport(create_app(device, max_body=1 << 20))
    async with httpx.AsyncClient(transport=app, base_url="http://device", headers=bearer()) as client:
        waiting = [asyncio.create_task(client.post(url, content=stalled())) for _ in range(4)]
        for _ in waiting:
            await taken.get()
        refused = await client.post(url, content=large)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        go.set()
        assert [(await post).status_code for post in waiting] == [400] * 4
        assert [(await client.post(url, content=large)).status_code for _ in range(5)] == [400] * 5


async def test_a_permission_may_be_for_some_models(device: Served) -> None:
    device.roles["clerk"] = ["run:model:ppocr-*"]
    device.roles["speaker"] = ["run:model:smollm2"]
    await ask(device, lambda c: c.infer(REC, given(SMALL)), "clerk")
    with pytest.raises(InferenceServerException, match="may not run:model ppocr-rec"):
        await ask(device, lambda c: c.infer(REC, given(SMALL)), "speaker")


async def test_metrics_tell_requests_failures_and_latency_of_each_model(device: Served) -> None:
    await ask(device, lambda c: c.infer(REC, given(SMALL)))
    with pytest.raises(InferenceServerException):
        await ask(device, lambda c: c.infer(REC, given(SMALL[0])))
    with pytest.raises(InferenceServerException):
        await ask(device, lambda c: c.infer("nothing", given(SMALL)))
    async with httpx.AsyncClient(base_url=device.url, headers=bearer("viewer")) as client:
        text = (await client.get("/metrics")).text
    for line in (
        "# TYPE outrider_request_seconds histogram",
        'outrider_requests_total{model="ppocr-rec"} 2',
        'outrider_failures_total{model="ppocr-rec"} 1',
        'outrider_request_seconds_bucket{model="ppocr-rec",le="+Inf"} 2',
        'outrider_request_seconds_count{model="ppocr-rec"} 2',
        'outrider_worker_restarts_total{worker="network"} 0',
        'outrider_worker_waiting{worker="network"} 0',
    ):
        assert line in text.splitlines()
    assert "nothing" not in text


async def test_a_network_whose_worker_died_is_not_ready_until_it_serves_again(device: Served) -> None:
    worker = device.models.workers["network"]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: not worker.connected)
    assert not await ask(device, lambda c: c.is_model_ready(REC) or c.is_server_ready())
    assert (await curl(f"{device.url}/v2/health/ready"))[0] == 503
    await ask(device, lambda c: c.infer(REC, given(SMALL)))
    assert await ask(device, lambda c: c.is_model_ready(REC) and c.is_server_ready())
    async with httpx.AsyncClient(base_url=device.url, headers=bearer("viewer")) as client:
        assert 'outrider_worker_restarts_total{worker="network"} 1\n' in (await client.get("/metrics")).text


def body(**more: Any) -> bytes:
    one = {"name": "x", "datatype": "INT32", "shape": [2], "data": [1, 2]}
    return json.dumps({"inputs": [one | more]}).encode()


@pytest.mark.parametrize(
    ("request_body", "header", "says"),
    [
        (b"{", None, "cannot be read"),
        (b"[" * 100_000, None, "cannot be read"),
        (
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
            None,
            "NaN and infinity go as binary",
        ),
        (b"{}", None, "inputs"),
        (b"{}", "x", "length of the JSON in Inference-Header"),
        (b"{}", "3", "length of the JSON in Inference-Header"),
        (b"{}", "0", "length of the JSON in Inference-Header"),
        (body(), "20", "cannot be read"),
        (body() + b"xx", str(len(body())), "2 bytes are left over"),
        (body(datatype="BYTES"), None, "'BYTES' is not supported .*FP16"),
        (body(datatype="int32"), None, "'int32' is not supported"),
        (body(shape=[-1]), None, "no shape"),
        (body(shape=[1] * 40), None, "no shape"),
        (body(shape=[3]), None, "does not fit the shape"),
        (body(shape=[10**9, 10**9]), None, "does not fit the shape"),
        (body(data=[[1], [2, 3]], shape=[2, 1]), None, "does not fit the shape"),
        (body(data=[[1], [2]], shape=[1, 2]), None, "does not fit the shape"),
        (body(data=[[1], [2]]), None, "not INT32"),
        (body(data=[1, "2"]), None, "not INT32.*str"),
        (body(data=[1, True]), None, "not INT32.*bool"),
        (body(data=[1, 2.5]), None, "not INT32"),
        (body(data=[1, None]), None, "not INT32"),
        (body(data=[1, 2**31]), None, "not INT32"),
        (body(data=[1, -1], datatype="UINT8"), None, "not UINT8"),
        (body(data=[1, 1e39], datatype="FP32"), None, "not FP32"),
        (body(data=[1, 70000], datatype="FP16"), None, "not FP16"),
        (body(data=[1, 0], datatype="BOOL"), None, "not BOOL"),
        (json.dumps({"inputs": [{"name": "x", "datatype": "INT32", "shape": [2]}]}).encode(), None, "has no data"),
        (body(parameters={"binary_data_size": 8}), None, "0 bytes are left"),
        (body(parameters={"binary_data_size": -1}), None, "binary_data_size of x is -1"),
        (body(parameters={"binary_data_size": "8"}), None, "binary_data_size of x is '8'"),
        (body(parameters={"binary_data_size": 0}), None, "has 8 bytes"),
        (body(parameters={"shared_memory_region": "r"}), None, "shared_memory_region is not supported"),
        (json.dumps({"inputs": [], "parameters": {"sequence_id": 4}}).encode(), None, "sequence_id is not supported"),
        (json.dumps({"inputs": [json.loads(body())["inputs"][0]] * 2}).encode(), None, "given twice"),
        (b" " * (tensors.MAX_JSON + 1), None, "binary data"),
    ],
)
def test_a_bad_request_is_refused_with_what_to_send(request_body: bytes, header: str | None, says: str) -> None:
    with pytest.raises(Refused, match=says):
        tensors.parse(request_body, tensors.json_length(len(request_body), header))


@pytest.mark.parametrize("datatype", sorted(set(tensors.DATATYPES.values())))
def test_every_datatype_goes_both_ways_as_numpy_has_it(datatype: str) -> None:
    dtype = next(d for d, known in tensors.DATATYPES.items() if known == datatype)
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    flat, nested = array.ravel().tolist(), array.tolist()
    for data in (flat, nested):
        made = body(datatype=datatype, shape=[2, 3], data=data)
        asked = tensors.parse(made, len(made))
        assert asked.inputs["x"] == Tensor(dtype, [2, 3], array.tobytes())
    pieces, length = tensors.respond({}, asked, asked.inputs)
    assert length is None
    assert json.loads(pieces[0])["outputs"] == [{"name": "x", "datatype": datatype, "shape": [2, 3], "data": flat}]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_lacks_is_refused_there_and_goes_as_binary_data(number: float) -> None:
    found = {"y": Tensor("float32", [1], struct.pack("<f", number))}
    asked = tensors.Asked({}, [], "", binary=False)
    with pytest.raises(Refused, match="ask for binary_data"):
        tensors.respond({}, asked, found)
    pieces, length = tensors.respond({}, tensors.Asked({}, [], "", binary=True), found)
    assert (len(pieces[0]), pieces[1]) == (length, found["y"].data)


@pytest.mark.parametrize(
    ("parameters", "urgency"),
    [
        ({}, (2, 60.0)),
        ({"priority": 1, "timeout": 250_000}, (0, 0.25)),
        ({"priority": 99, "timeout": 10**12}, (3, 60.0)),
    ],
)
def test_tritons_priority_and_timeout_are_the_serving_class_and_the_deadline(
    parameters: dict[str, Any], urgency: tuple[int, float]
) -> None:
    one = {"name": "x", "datatype": "UINT8", "shape": [1], "data": [1]}
    body = json.dumps({"inputs": [one], "parameters": parameters}).encode()
    asked = tensors.parse(body, len(body))
    assert (asked.priority, asked.within_s) == urgency
    wrong = json.dumps({"inputs": [one], "parameters": {"priority": -1}}).encode()
    with pytest.raises(Refused, match="priority"):
        tensors.parse(wrong, len(wrong))


async def test_a_request_whose_time_is_over_before_its_turn_is_a_503_that_says_so(device: Served) -> None:
    async def late() -> str:
        with pytest.raises(InferenceServerException) as caught:
            await ask(device, lambda c: c.infer(REC, given(SMALL), timeout=1))
        return str(caught.value)

    assert "within" in await late() or "its time was over" in await late()
    found = await ask(device, lambda c: c.infer(REC, given(SMALL), priority=1))
    assert found.as_numpy("codepoint") is not None
