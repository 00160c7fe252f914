"""The accelerators a network may run on through ONNX Runtime: what each needs, and how a session is given it.

Invariant: a name that is not here, a provider that this onnxruntime lacks and a plug-in that does not load are Refused
with the command that mends it; that a provider is listed proves nothing, an inference does (see onnxruntime.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from edge_agent.errors import Refused

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt-ep": (TENSORRT, CUDA, CPU), "tensorrt-rtx-ep": (RTX, CPU),
}  # fmt: skip
"""By the accelerator's name in the settings: the first provider must run nodes, the others may take what it cannot."""
_GPU_WHEEL = (
    "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]', and NVIDIA's driver; on a Jetson"
)
_FIXES = {
    CUDA: f"{_GPU_WHEEL} use the accelerator tensorrt",
    TENSORRT: f"{_GPU_WHEEL} use the accelerator tensorrt; TensorRT's libraries too: pip install tensorrt-cu13",
    RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx, and NVIDIA's driver for an RTX GPU",
}
_PLUGINS = {RTX: "onnxruntime_ep_nv_tensorrt_rtx"}


def fix(providers: Sequence[str]) -> str:
    """What makes the first of these run here, or lets the CPU do it."""
    known = f"; or list cpu after it in accelerator: now there are {', '.join(ort.get_available_providers())}"
    return _FIXES.get(next(iter(providers), ""), "one of " + ", ".join(PROVIDERS)) + known


def give(options: Any, providers: Sequence[str], cache: Path | None) -> list[Any]:
    """What to make a session with; a plug-in's devices go into `options`. Raises Refused, naming the fix."""
    for provider in providers:
        if (plugin := _PLUGINS.get(provider)) and (devices := _devices(provider, plugin)) is not None:
            options.add_provider_for_devices(devices, {})
            return []  # what no plug-in takes runs on the CPU
    missing = [provider for provider in providers if provider not in ort.get_available_providers()]
    if missing or not providers:
        raise Refused(f"this onnxruntime has no {', '.join(missing) or 'provider asked for'}", fix(missing))
    kept = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    return [(provider, kept) if provider == TENSORRT and cache else provider for provider in providers]


def _devices(provider: str, plugin: str) -> list[Any] | None:
    """The devices of a plug-in provider; None when it is not installed, or built in. Raises Refused: it has none."""
    if provider in ort.get_available_providers() or find_spec(plugin) is None:
        return None
    try:
        if all(device.ep_name != provider for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(provider, str(import_module(plugin).get_library_path()))
    except Exception as error:  # the runtime's exceptions share no base but Exception
        raise Refused(f"{provider} does not load: {str(error)[:300]}", fix([provider])) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if not devices:
        raise Refused(f"{provider} finds no GPU that it runs on", fix([provider]))
    return devices
