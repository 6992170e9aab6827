"""8-bit models: calibrated on images, measured against the model they come from, given back the precision they need.

Quantizing costs some layers more than others, and which can only be measured. NNCF quantizes every layer; if that
loses more than is allowed, it returns layers to floating point one group after the other, those first that lose most.
The measure is that of the task (`evaluation.MEASURES`) against the truth where there is one, and otherwise against the
predictions of the model before it was quantized, for which any images will do.
"""

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.bundle.runtime import compile_options
from helpers.errors import BundleError, first_line
from helpers.export import evaluation
from helpers.export.graph import MULTIPLYING
from helpers.tasks import Arrays

if TYPE_CHECKING:
    import openvino as ov

log = logging.getLogger(__name__)

MAX_DROP = 0.005  # of accuracy or mask AP against the truth; half a point
MAX_DISAGREEMENT = 0.05  # of the same against the model's own predictions, which says more of small changes
BOX_DISAGREEMENT = 0.1  # of box AP50, which one box of a dozen pictures moves by 0.08
VALIDATION_IMAGES = 64
RANKING_IMAGES = 16  # that show which layers lose most
MAX_GROUPS = 20  # of layers that are returned to floating point
MAX_SECONDS = 300  # for finding out which


@dataclass(frozen=True)
class Validation:
    """Images that show what quantizing loses."""

    images: Sequence[np.ndarray]  # uint8 `[H, W, C]` each, prepared as the pipeline prepares them
    # See `helpers.export.evaluation`; None to compare with the model before it was quantized.
    truth: evaluation.Truth | None = None
    # Of accuracy or mask AP, a share of 1; above it, layers are returned to floating point. By default `MAX_DROP`,
    # without truth `MAX_DISAGREEMENT` or `BOX_DISAGREEMENT`.
    max_drop: float | None = None


@dataclass(frozen=True)
class Record:
    """What quantizing lost and what was done about it; a bundle's manifest holds it."""

    measure: str  # what was measured, and against what
    before: float  # the measure's value of the model that was quantized
    after: float  # of the quantized model
    # Convolutions and matrix products that are not computed in 8 bits, by their names in the graph.
    float_layers: list[str]


def quantize(
    model: "ov.Model",
    images: Iterable[np.ndarray],
    manifest: Manifest,
    arrays: Arrays,
    validation: Validation | None = None,
    engine: evaluation.Engine | None = None,
) -> tuple["ov.Model", Record, evaluation.Engine]:
    """Quantize weights and activations to 8 bits with NNCF; returned compiled too.

    Args:
        model: takes uint8 images; it is not changed, but that tensors without a name may get one.
        images: calibration images, uint8 `[H, W, C]` each, prepared as the pipeline prepares them.
        manifest: of the model; says how its outputs are post-processed.
        arrays: that post-processing needs.
        validation: by default some of the calibration images, and the model itself for the truth.
        engine: the model compiled for one image at a time, where it is already.

    Raises:
        BundleError: there are no images, the model is of 8 bits already, or NNCF cannot quantize it.
    """
    import nncf

    if any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        raise BundleError(f"{manifest.architecture} is of 8 bits already: --precision fp32 keeps them")
    batches = [image[None] for image in images]
    if not batches:
        raise BundleError("int8 needs images to calibrate with; name a folder of them with --calibration")
    step = -(-len(batches) // VALIDATION_IMAGES)
    validation = validation or Validation([batch[0] for batch in batches[::step]])
    measure = Measure.of(engine or _engine(model), validation, manifest, arrays)
    log.info("quantizing; if %s falls by more than %.3f, layers are tried one by one", measure.name, measure.max_drop)
    logging.getLogger("nncf").setLevel(logging.WARNING)
    for node in model.get_ops():  # NNCF knows what goes into branches by its name
        for port in node.input_values() if node.get_type_name() == "If" else []:
            if not port.get_names():
                port.get_tensor().set_names({f"{port.get_node().get_friendly_name()}:{port.get_index()}"})
    quantizing = {
        "calibration_dataset": nncf.Dataset(batches),
        "subset_size": len(batches),
        "ignored_scope": nncf.IgnoredScope(names=find_tail(model), validate=False),
    }
    deadline = time.monotonic() + MAX_SECONDS
    try:
        # NNCF's accuracy control compiles and measures both models anew, so it is asked only where 8 bits lose much.
        with quiet():
            quantized = nncf.quantize(model, **quantizing)
        after = measure.score(engine := _engine(quantized), validation.images)
        if measure.before - after > measure.max_drop:
            try:
                quantized = _restore(model, quantizing, measure, validation.images, deadline)
                after = measure.score(engine := _engine(quantized), validation.images)
            except TimeoutError:
                log.warning("in %d s it is not known which layers lose most, so all are of 8 bits", MAX_SECONDS)
    except Exception as error:  # NNCF raises whatever a graph leads it to
        problem = f"NNCF cannot quantize {manifest.architecture} ({first_line(error)})"
        raise BundleError(f"{problem}; export it with --precision fp16") from error
    # Rounded to what several runs have in common.
    record = Record(measure.name, round(measure.before, 4), round(after, 4), float_layers(quantized))
    if record.float_layers:
        log.info("kept in floating point, because 8 bits lose too much: %s", ", ".join(record.float_layers))
    if measure.before - after > measure.max_drop:
        log.warning("int8 loses more than asked for: %s is %.3f, before %.3f", record.measure, after, record.before)
    return quantized, record, engine


def _restore(
    model: "ov.Model", quantizing: dict[str, Any], measure: "Measure", images: Sequence[np.ndarray], deadline: float
) -> "ov.Model":
    """Quantize and return layers to floating point until little enough is lost; TimeoutError after the deadline."""
    import nncf

    def validate(compiled: "ov.CompiledModel", items: Iterable[tuple[int, np.ndarray]]) -> tuple[float, list[float]]:
        if time.monotonic() > deadline:
            raise TimeoutError
        return measure.validate(compiled, items)

    limit = nncf.AdvancedAccuracyRestorerParameters(
        max_num_iterations=MAX_GROUPS, ranking_subset_size=RANKING_IMAGES, num_ranking_workers=1
    )
    with quiet():
        return nncf.quantize_with_accuracy_control(
            model,
            validation_dataset=nncf.Dataset(list(enumerate(images))),
            validation_fn=validate,
            max_drop=measure.max_drop,
            advanced_accuracy_restorer_parameters=limit,
            **quantizing,
        )


@dataclass(frozen=True)
class Measure:
    """How good the predictions of a compiled model are; `before` is that of the model before it was quantized."""

    name: str
    truth: evaluation.Truth
    before: float
    max_drop: float
    manifest: Manifest
    arrays: Arrays

    @classmethod
    def of(cls, engine: evaluation.Engine, validation: Validation, manifest: Manifest, arrays: Arrays) -> "Measure":
        """Prepare to measure on these images, with the model before it is quantized."""
        name, truth, allowed = evaluation.MEASURES[manifest.task], validation.truth, MAX_DROP
        predictions = evaluation.predict(engine, validation.images, manifest, arrays)
        if truth is None:
            allowed = BOX_DISAGREEMENT if name == evaluation.BOX_MEASURE else MAX_DISAGREEMENT
            name, truth = f"{name} against the model before", evaluation.to_truth(predictions, manifest)
            if isinstance(truth, dict) and not truth["annotations"]:
                log.warning("nothing is found in the calibration images, so what int8 loses cannot be measured")
        max_drop = allowed if validation.max_drop is None else validation.max_drop
        return cls(name, truth, evaluation.score(dict(enumerate(predictions)), truth), max_drop, manifest, arrays)

    def score(self, engine: evaluation.Engine, images: Sequence[np.ndarray]) -> float:
        """Measure a model on all of the images."""
        predictions = evaluation.predict(engine, images, self.manifest, self.arrays)
        return evaluation.score(dict(enumerate(predictions)), self.truth)

    def validate(
        self, compiled: "ov.CompiledModel", items: Iterable[tuple[int, np.ndarray]]
    ) -> tuple[float, list[float]]:
        """Measure a model on some of the images, given with their numbers: of all together, and of each."""
        numbers, images = zip(*items, strict=True)
        ordered = evaluation.predict(evaluation.compiled_engine(compiled), images, self.manifest, self.arrays)
        predictions = dict(zip(numbers, ordered, strict=True))
        each = [evaluation.score({number: of_image}, self.truth) for number, of_image in predictions.items()]
        return evaluation.score(predictions, self.truth), each


def find_tail(model: "ov.Model") -> list[str]:
    """Names of what follows the last convolutions and matrix products, to which it never leads back.

    It chooses boxes and numbers classes: 8 bits save nothing there, and would give an object another class's number.
    """
    leading: set[str] = set()
    tail = []
    for node in reversed(model.get_ordered_ops()):
        users = [port.get_node() for output in node.outputs() for port in output.get_target_inputs()]
        name = node.get_friendly_name()
        if any(user.get_type_name() in MULTIPLYING or user.get_friendly_name() in leading for user in users):
            leading.add(name)
        elif node.get_type_name() not in (*MULTIPLYING, "Constant", "Result"):
            tail.append(name)
    return tail


def float_layers(model: "ov.Model") -> list[str]:
    """Names of the convolutions and matrix products of a quantized model whose weights are not 8-bit."""
    return [
        node.get_friendly_name().removesuffix("/WithoutBiases")
        for node in model.get_ordered_ops()
        if node.get_type_name() in MULTIPLYING and _weights_of(node).get_element_type().size > 1
    ]


def compile_exactly(model: "ov.Model") -> "ov.CompiledModel":
    """Compile for measuring: what is not 8-bit is computed in 32 bits, with every core."""
    import openvino as ov

    return ov.Core().compile_model(model, "CPU", compile_options("f32", threads=0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the converters' progress and notices out of notebooks and logs; errors are exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _engine(model: "ov.Model") -> evaluation.Engine:
    return evaluation.compiled_engine(compile_exactly(model))


def _weights_of(node: "ov.Node") -> "ov.Node":
    source = node.input_value(1).get_node()
    while source.get_type_name() != "Constant":  # 8-bit weights are converted and scaled on their way
        source = source.input_value(0).get_node()
    return source
