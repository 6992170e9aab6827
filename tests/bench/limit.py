"""The hardware's limit, near enough: one process, decoding threads, OpenVINO's AsyncInferQueue, no Spark.

Prints one JSON line. Same decode-and-resize, bundle and post-processing as the pipeline.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.bundle.manifest import load_bundle
from helpers.bundle.runtime import compile_options
from helpers.images.decoding import load
from helpers.storage import open_storage
from helpers.tasks import parameters_for, predict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    bundle = load_bundle(open_storage(options.model))
    paths = sorted(options.source.iterdir())
    start = time.perf_counter()
    rows = infer(bundle, paths, options.cores)
    pq.write_table(pa.Table.from_pylist(rows), options.output)
    seconds = time.perf_counter() - start
    print(json.dumps({"images": len(rows), "seconds": seconds, "images_per_second": len(rows) / seconds}))


def infer(bundle, paths, cores) -> list[dict]:
    manifest = bundle.manifest
    core = ov.Core()
    model = core.read_model(model=bundle.read("model.xml"), weights=bundle.read("model.bin"))
    model.reshape([1, *manifest.input.shape])
    settings = {**compile_options(manifest.arithmetic, cores), "NUM_STREAMS": cores}
    queue = ov.AsyncInferQueue(core.compile_model(model, "CPU", settings), 2 * cores)
    rows: list[dict] = []
    parameters = parameters_for(manifest, {})

    def finish(request, item) -> None:
        path, size = item
        outputs = {o.name: request.get_tensor(o.name).data for o in manifest.outputs}
        (predictions,) = predict(outputs, [size], manifest, parameters)
        rows.append({"path": str(path), "predictions": predictions})

    queue.set_callback(finish)
    with ThreadPoolExecutor(cores) as pool:
        for path, size, pixels in pool.map(lambda p: prepare(p, manifest.input), paths):
            queue.start_async({0: pixels[None]}, (path, size))
    queue.wait_all()
    return rows


def prepare(path, spec) -> tuple[Path, tuple[int, int], np.ndarray]:
    pixels, size = load(path.read_bytes(), spec, 2**28)
    return path, size, pixels


if __name__ == "__main__":
    main()
