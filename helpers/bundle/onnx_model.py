"""ONNX Runtime behind the face of `runtime.Model`: for NVIDIA GPUs, which OpenVINO does not use.

Executors import this module; ONNX Runtime is imported where a model is loaded only.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from helpers.bundle.manifest import Bundle
from helpers.bundle.runtime import Model
from helpers.errors import BundleError, HostError, first_line
from helpers.images.spec import InputSpec

FILE = "model.onnx"
CUDA = "CUDAExecutionProvider"
QUIET = 3  # ONNX Runtime's level of errors only


@dataclass(frozen=True)
class OnnxModel(Model):
    """A bundle's ONNX graph, which takes normalized float32 `[B, C, H, W]`, with the normalization before it."""

    spec: InputSpec = field(kw_only=True)
    pool: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1), kw_only=True)

    def _start(self, pixels: np.ndarray) -> Future[dict[str, np.ndarray]]:
        return self.pool.submit(self._run, pixels)

    def _finish(self, request: Future[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return request.result()

    def _run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        mean, std = (np.array(values, np.float32) for values in (self.spec.mean, self.spec.std))
        values = np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))
        feeds = {self.compiled.get_inputs()[0].name: values}
        return dict(zip(self.outputs, self.compiled.run(list(self.outputs), feeds), strict=True))


def load_onnx(bundle: Bundle, threads: int, provider: str = CUDA, device: int = 0) -> OnnxModel:
    """Load a bundle's ONNX graph for the GPU of a number; `threads` are of what is computed on the CPU.

    Raises BundleError if the bundle has no such graph, or ONNX Runtime cannot load it, and HostError if this host has
    no such provider.
    """
    if FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.storage.root} has no {FILE}, which CUDA needs; export it with --keep-onnx")
    try:
        import onnxruntime
    except ImportError:
        raise HostError("inference.device=CUDA needs ONNX Runtime: pip install onnxruntime-gpu") from None
    providers = onnxruntime.get_available_providers()
    if provider not in providers:
        raise HostError(
            f"ONNX Runtime has {', '.join(providers)} here, and not {provider}: pip install onnxruntime-gpu in place "
            "of onnxruntime, or set inference.device to another device"
        )
    start = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, QUIET
    # Several tasks share a GPU: none takes more of its memory than it needs. Without TF32, f32 is what it says.
    settings = {"device_id": device, "arena_extend_strategy": "kSameAsRequested", "use_tf32": 0}
    try:
        chosen = [(provider, settings if provider == CUDA else {})]
        session = onnxruntime.InferenceSession(bundle.read(FILE), options, providers=chosen)
    except BundleError:
        raise
    except Exception as error:  # of kinds of its own
        raise BundleError(f"ONNX Runtime cannot load {bundle.storage.join(FILE)}: {first_line(error)}") from None
    if session.get_providers()[0] != provider:  # it warns and goes on on the CPU, without CUDA's libraries for example
        raise HostError(f"{provider} cannot be used here: install the CUDA and cuDNN that onnxruntime-gpu needs")
    manifest, known = bundle.manifest, {output.name for output in session.get_outputs()}
    names = tuple(output.name for output in manifest.outputs)
    if missing := set(names) - known:
        raise BundleError(f"{bundle.storage.join(FILE)} has no output {min(missing)!r}; export the bundle again")
    return OnnxModel(session, names, time.perf_counter() - start, manifest.batch == 1, spec=manifest.input)
