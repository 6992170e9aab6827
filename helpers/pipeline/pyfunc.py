"""A bundle as a model of MLflow: a table of paths or bytes in, their predictions out, by the stages of the pipeline.

MLflow loads it by the name of this module. Tasks of its Spark UDF import it, so it needs what executors have, and
pandas. The UDF knows no nulls in structures, and predictions have some: with the parameter `format` as `json`, a row is
one text, which `from_json` reads.
"""

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyarrow as pa

from helpers.bundle.manifest import Bundle, load_bundle
from helpers.bundle.runtime import batch_size
from helpers.images.boundary import attempt
from helpers.pipeline import stages
from helpers.pipeline.schemas import IMAGE_SCHEMA, RESULT_SCHEMA
from helpers.storage import LocalStorage, open_storage
from helpers.tasks import parameters_for

PATH, CONTENT = "path", "content"  # the columns of its input; one of them is enough
FORMAT, COLUMNS, JSON = "format", "columns", "json"  # a parameter and its values
OUTPUTS = ("error", "width", "height", "predictions", "embedding")
OUTPUT_SCHEMA = pa.schema([RESULT_SCHEMA.field(name) for name in OUTPUTS])
# As conf/base.yaml has them: a model that is loaded by its name has no configuration.
BATCH_MEGABYTES, MAX_BATCH, MAX_PIXELS = 1, 64, 178_956_970


class Predictor:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.parameters = parameters_for(bundle.manifest, {})

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predict one image per row; what goes wrong with an image is its `error`.

        The input has a column `path` of locations, or `content` of the images' bytes, which comes first. Returns the
        columns of `OUTPUT_SCHEMA`, row by row, or with the parameter `format` as `json` one column of the same as JSON.
        """
        manifest = self.bundle.manifest
        size = batch_size(self.bundle, BATCH_MEGABYTES, MAX_BATCH)
        batches: Any = stages.preprocess(_read(model_input, size), manifest.input, size, MAX_PIXELS)
        batches = stages.infer(batches, self.bundle, None, threads=1)
        batches = stages.postprocess(batches, manifest, self.parameters, manifest.model, self.bundle.read)
        rows = [row for batch in batches for row in batch.to_pylist()]
        if (params or {}).get(FORMAT) == JSON:
            texts = [json.dumps({name: row[name] for name in OUTPUTS}) for row in rows]
            return pd.DataFrame({JSON: texts}, model_input.index)
        values = {name: pd.Series([row[name] for row in rows], dtype=object) for name in OUTPUTS}
        return pd.DataFrame(values).set_index(model_input.index)


def _load_pyfunc(path: str) -> Predictor:
    """What MLflow calls with the folder of the bundle."""
    return Predictor(load_bundle(LocalStorage(path)))


def _read(inputs: pd.DataFrame, size: int) -> Iterator[pa.RecordBatch]:
    """Batches of `IMAGE_SCHEMA`."""
    paths = inputs[PATH] if PATH in inputs else [None] * len(inputs)
    contents = inputs[CONTENT] if CONTENT in inputs else [None] * len(inputs)
    rows = []
    for path, content in zip(paths, contents, strict=True):
        error = None
        if not isinstance(content, bytes):
            content, error = attempt(_read_file, path)
        rows.append({"path": path, "length": len(content or b""), "error": error, "content": content})
        if len(rows) == size:
            yield pa.RecordBatch.from_pylist(rows, IMAGE_SCHEMA)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, IMAGE_SCHEMA)


def _read_file(path: str) -> bytes:
    folder, _, name = path.rpartition("/")
    return open_storage(folder or ("/" if path.startswith("/") else ".")).read(name)
