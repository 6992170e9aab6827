"""OpenVINO in a Spark task: one compiled model a Python worker, asynchronous requests, threads that fit the task.

For NVIDIA GPUs, which OpenVINO does not use, ONNX Runtime is behind the same face. Executors import this module; it
needs numpy, and either of the two where a model is loaded.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.bundle.manifest import MANIFEST, OPEN, Bundle
from helpers.errors import BundleError, HostError, first_line
from helpers.images.spec import InputSpec
from helpers.memory import resident_megabytes
from helpers.temporary import user_folder

if TYPE_CHECKING:
    import openvino as ov

log = logging.getLogger(__name__)

SINGLE_MEGABYTES = 1  # inputs and outputs of which not even two images fit into this are inferred one by one
ANY = OPEN  # a graph's dimension
ONNX_FILE = "model.onnx"
CUDA = "CUDAExecutionProvider"
ONNX_ERRORS = 3  # ONNX Runtime's level of errors only
REQUESTS = 2  # one batch is inferred while the next is read and decoded

_models: dict[tuple[str, str, int, str], "Model"] = {}
_loading = threading.Lock()  # tasks may be threads of one process
_tasks = 1  # that run at once in this process


@dataclass(frozen=True)
class Model:
    """A compiled model: how long loading took, the names of its outputs, and requests that wait to be used again."""

    compiled: Any
    outputs: tuple[str, ...]
    load_seconds: float
    single: bool = False  # compiled for one image at a time
    # Making a request takes milliseconds, and each task needs two.
    idle: "list[ov.InferRequest]" = field(default_factory=list)
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of batches that were inferred

    def infer(self, batches: Iterable[tuple[Any, np.ndarray]]) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        """Run batches through the model, in order; the next is prepared while one is computed.

        Batches are pairs of anything and uint8 `[B, H, W, C]`; B may differ, and may be 0; at most 1 where `single`.
        Yields the same anything, and the outputs by name, each float32 `[B, ...]`.
        """
        pending: deque[tuple[Any, np.ndarray, Any]] = deque()  # pixels too, which requests share

        def finish() -> tuple[Any, dict[str, np.ndarray]]:
            item, _, request = pending.popleft()
            return item, {} if request is None else self._finish(request)

        for item, pixels in batches:
            pending.append((item, pixels, self._start(pixels) if len(pixels) else None))
            if len(pending) == REQUESTS:
                yield finish()
        while pending:
            yield finish()

    def _start(self, pixels: np.ndarray) -> Any:
        try:
            request = self.idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        request.start_async({0: pixels}, share_inputs=True)
        if pixels.shape not in self.shapes:
            request.wait()  # it takes the memory for them, which decoding meanwhile is not to hold back
            self.shapes.add(pixels.shape)
        return request

    def _finish(self, request: Any) -> dict[str, np.ndarray]:
        request.wait()
        self.idle.append(request)
        return {name: request.get_tensor(name).data.copy() for name in self.outputs}


def get_model(
    bundle: Bundle,
    precision: str | None = None,
    threads: int = 1,
    memory_megabytes: int | None = None,
    device: str = "CPU",
) -> Model:
    """Return this process's compiled model of a bundle, loading it the first time only.

    Args:
        bundle: what to load.
        precision: arithmetic, `f32`, `bf16` or `f16`; by default the manifest's.
        threads: OpenVINO threads; a Spark task has one core.
        memory_megabytes: what this process may take; None for no limit.
        device: `CPU`, `GPU`, `NPU` or `AUTO` of OpenVINO, or `CUDA` of ONNX Runtime; `GPU.1` is the second one.

    Raises:
        BundleError: a file is missing or damaged, OpenVINO cannot read it, or it takes too much memory.
        HostError: there is no such device.
    """
    precision = precision or bundle.manifest.arithmetic
    key = (bundle.manifest.model, precision, threads, device)
    with _loading:
        if key not in _models:
            _models[key] = _load(bundle, precision, threads, device)
            # Spark's workers collect garbage after every task, and walk all that was imported each time unless it is
            # set apart: 70 ms per task.
            gc.collect()
            gc.freeze()
    resident = resident_megabytes()
    if memory_megabytes is not None and resident > memory_megabytes:
        raise BundleError(
            f"a task takes {resident:.0f} MB with {bundle.manifest.model} loaded, more than inference.memory_megabytes="
            f"{memory_megabytes}: set it higher, with fewer tasks at a time (spark.master=local[1]) if memory is short"
        )
    return _models[key]


def share(tasks: int) -> None:
    """Have models that are loaded from now on serve so many tasks of this process at once."""
    global _tasks
    _tasks = tasks


def loading_seconds() -> float:
    """What loading models has taken this process so far."""
    return sum(model.load_seconds for model in _models.values())


def batch_size(bundle: Bundle, megabytes: int, max_images: int) -> int:
    """Images per batch, so that its inputs and outputs stay within a budget; 1 where each has a size of its own."""
    manifest = bundle.manifest
    if manifest.input.is_variable or any(OPEN in output.shape for output in manifest.outputs):
        return 1
    outputs = sum(4 * int(np.prod(output.shape)) for output in manifest.outputs)
    return max(1, min(max_images, megabytes * 2**20 // (manifest.input.nbytes + outputs)))


def read_graph(core: "ov.Core", bundle: Bundle) -> "tuple[ov.Model, bool]":
    """Read a bundle's graph, and say whether it takes one image at a time.

    Large inputs and outputs gain nothing from batches, and a graph of fixed shapes is faster. Other graphs give right
    outputs for one image only. Raises BundleError if a file is missing or damaged, or the graph is not what the
    manifest says, and RuntimeError if OpenVINO cannot read it.
    """
    graph = core.read_model(model=bundle.read("model.xml"), weights=bundle.read("model.bin"))
    manifest = bundle.manifest
    single = manifest.batch == 1 or batch_size(bundle, SINGLE_MEGABYTES, max_images=2) == 1
    batch = 1 if single else ANY
    height, width, channels = manifest.input.shape
    shape = (ANY, ANY, channels) if manifest.input.is_variable else (height, width, channels)
    if len(graph.inputs) != 1:
        raise _lies(bundle, f"one input, and the graph has {len(graph.inputs)}")
    _compare(bundle, "that the input", graph.inputs[0], "u8", shape, {batch, ANY})
    if single:
        graph.reshape([1, *shape])
    ports = {name: port for port in graph.outputs for name in port.get_names()}
    for output in manifest.outputs:
        if output.name not in ports:
            raise _lies(bundle, f"an output {output.name!r}, and the graph's are {', '.join(sorted(ports))}")
        _compare(bundle, f"that the output {output.name!r}", ports[output.name], "f32", output.shape, {batch})
    if len(manifest.outputs) != len(graph.outputs):
        raise _lies(bundle, f"{len(manifest.outputs)} outputs, and the graph has {len(graph.outputs)}")
    return graph, single


def _compare(bundle: Bundle, what: str, port: Any, element: str, shape: tuple[int, ...], batches: set[int]) -> None:
    """Compare what the manifest says of an input or output with the graph's own, which takes so many images."""
    dimensions, kind = port.get_partial_shape(), port.get_element_type().get_type_name()
    lengths = [d.get_length() if d.is_static else ANY for d in dimensions] if dimensions.rank.is_static else []
    if kind != element or lengths not in [[batch, *shape] for batch in batches]:
        told = f"{element} [?,{','.join(map(str, shape))}]"
        raise _lies(bundle, f"{what} is {told}, and the graph's is {kind} {dimensions}")


def _lies(bundle: Bundle, difference: str) -> BundleError:
    return BundleError(f"{bundle.storage.join(MANIFEST)} says {difference}; export the bundle again")


def compile_options(precision: str, threads: int, device: str = "CPU") -> dict[str, Any]:
    """OpenVINO's settings for a task, each set on purpose."""
    if device != "CPU":  # which has neither threads nor bf16 units, or chooses for itself
        return {"INFERENCE_PRECISION_HINT": "f16" if precision == "bf16" else precision}
    return {
        # On CPUs with bf16 units OpenVINO computes in bf16 unless told otherwise, whatever the file holds.
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads * _tasks,
        "NUM_STREAMS": _tasks,
        # With pinning, every worker process of one thread sits on the first core.
        "ENABLE_CPU_PINNING": False,
    }


def has_bf16() -> bool:
    """Whether this CPU has bfloat16 units; without them OpenVINO computes in 32 bits what asks for bf16."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _load(bundle: Bundle, precision: str, threads: int, device: str) -> Model:
    kind, _, number = device.partition(".")
    if kind == "CUDA":
        return load_onnx(bundle, threads, device=int(number or 0))
    start = time.perf_counter()
    import openvino as ov  # the driver of a run loads no model, and so does without

    # It makes a table when it is first called, and two tasks of one process that do so at once wait for each other for
    # ever: one has the table's lock and wants Python's, the other has Python's.
    ov.Type.u8.to_dtype()
    core = ov.Core()
    if device != "AUTO" and not any(name in (device, f"{device}.0") for name in core.available_devices):
        remedy = "install its driver, or set inference.device to one of them, to AUTO, or to CUDA for NVIDIA's"
        names = ", ".join(core.available_devices)
        raise HostError(f"OpenVINO has the devices {names} here, and not {device}: {remedy}")
    if folder := user_folder():
        core.set_property({"CACHE_DIR": str(folder / "openvino")})
    try:
        graph, single = read_graph(core, bundle)
        compiled = core.compile_model(graph, device, compile_options(precision, threads, device))
    except RuntimeError as error:
        raise BundleError(f"OpenVINO {ov.__version__} cannot load {bundle.storage.root}: {first_line(error)}") from None
    if device == "CPU" and precision == "bf16" and not has_bf16():
        log.warning("this CPU has no bfloat16 units, so it computes %s in 32 bits", bundle.manifest.model)
    seconds = time.perf_counter() - start
    log.info("loaded %s (%s, %d threads, %s) in %.2f s", bundle.manifest.model, precision, threads, device, seconds)
    return Model(compiled, tuple(output.name for output in bundle.manifest.outputs), seconds, single)


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
    if ONNX_FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.storage.root} has no {ONNX_FILE}, which CUDA needs; export it with --keep-onnx")
    try:
        import onnxruntime
    except ImportError:
        raise HostError("inference.device=CUDA needs ONNX Runtime: pip install onnxruntime-gpu") from None
    providers = onnxruntime.get_available_providers()
    if provider not in providers:
        remedy = "pip install onnxruntime-gpu in place of onnxruntime, or set inference.device to another device"
        raise HostError(f"ONNX Runtime has {', '.join(providers)} here, and not {provider}: {remedy}")
    content, start = bundle.read(ONNX_FILE), time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, ONNX_ERRORS
    # Several tasks share a GPU: none takes more of its memory than it needs. Without TF32, f32 is what it says.
    settings = {"device_id": device, "arena_extend_strategy": "kSameAsRequested", "use_tf32": 0}
    try:
        chosen = [(provider, settings if provider == CUDA else {})]
        session = onnxruntime.InferenceSession(content, options, providers=chosen)
    except Exception as error:  # of kinds of its own
        raise BundleError(f"ONNX Runtime cannot load {bundle.storage.join(ONNX_FILE)}: {first_line(error)}") from None
    if session.get_providers()[0] != provider:  # it warns and goes on on the CPU, without CUDA's libraries for example
        raise HostError(f"{provider} cannot be used here: install the CUDA and cuDNN that onnxruntime-gpu needs")
    manifest, known = bundle.manifest, {output.name for output in session.get_outputs()}
    names = tuple(output.name for output in manifest.outputs)
    if missing := set(names) - known:
        raise BundleError(f"{bundle.storage.join(ONNX_FILE)} has no output {min(missing)!r}; export the bundle again")
    return OnnxModel(session, names, time.perf_counter() - start, manifest.batch == 1, spec=manifest.input)
