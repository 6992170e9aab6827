"""The photographs of a folder by Daft or Ray Data, in an environment that `peers.py` makes; prints one JSON line.

Fused, one function takes paths and reads, decodes, resizes, infers and post-processes as the pipeline does. As their
guides have it, the library reads, decodes and resizes, and a function infers. Both have two slots.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from helpers.bundle.manifest import load_bundle
from helpers.bundle.runtime import compile_options
from helpers.images.decoding import load
from helpers.storage import open_storage
from helpers.tasks import parameters_for, predict

SLOTS, BATCH = 2, 64


class Classifier:
    """A bundle in one thread of OpenVINO."""

    def __init__(self, location: str):
        bundle = load_bundle(open_storage(location))
        self.manifest, self.parameters = bundle.manifest, parameters_for(bundle.manifest, {})
        model = ov.Core().read_model(model=bundle.read("model.xml"), weights=bundle.read("model.bin"))
        self.compiled = ov.Core().compile_model(model, "CPU", compile_options(self.manifest.arithmetic, 1))

    def of_files(self, paths: list[str]) -> list[int]:
        """The best class of each file."""
        loaded = [load(Path(path.removeprefix("file://")).read_bytes(), self.manifest.input, 2**28) for path in paths]
        return self.of_pixels(np.stack([pixels for pixels, _ in loaded]), [size for _, size in loaded])

    def of_pixels(self, pixels: np.ndarray, sizes: list[tuple[int, int]]) -> list[int]:
        """The best class of each image of uint8 `[B, H, W, 3]`."""
        computed = self.compiled(pixels)
        outputs = {output.name: computed[output.name] for output in self.manifest.outputs}
        return [rows[0]["class_id"] for rows in predict(outputs, sizes, self.manifest, self.parameters)]


def with_daft(source: str, model: str, output: str, is_fused: bool) -> None:
    """Daft's native runner."""
    import daft

    @daft.cls(max_concurrency=SLOTS)
    class Function(Classifier):
        @daft.method.batch(return_dtype=daft.DataType.int64(), batch_size=BATCH)
        def classify(self, values: daft.Series) -> list[int]:
            if is_fused:
                return self.of_files(values.to_pylist())
            images = np.stack(values.to_pylist())
            return self.of_pixels(images, [images.shape[2:0:-1]] * len(images))

    rows, column = daft.from_glob_path(f"{source}/*.jpg").select("path"), daft.col("path")
    if not is_fused:
        height, width, _ = load_bundle(open_storage(model)).manifest.input.shape
        column = column.download().decode_image(mode="RGB").resize(width, height)
    rows.with_column("class_id", Function(model).classify(column)).write_parquet(output)


def with_ray(source: str, model: str, output: str, is_fused: bool) -> None:
    """Ray Data on a cluster of this machine."""
    import ray

    class Function(Classifier):
        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            if is_fused:
                return {"path": batch["path"], "class_id": self.of_files(batch["path"].tolist())}
            images = batch["image"]
            return {"path": batch["path"], "class_id": self.of_pixels(images, [images.shape[2:0:-1]] * len(images))}

    # A slot more for what reads and writes, which otherwise waits for the functions, and they for it.
    ray.init(num_cpus=SLOTS + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    if is_fused:
        paths = [{"path": str(path)} for path in sorted(Path(source).iterdir())]
        rows = ray.data.from_items(paths, override_num_blocks=len(paths) // BATCH + 1)
    else:
        height, width, _ = load_bundle(open_storage(model)).manifest.input.shape
        rows = ray.data.read_images(source, size=(height, width), mode="RGB", include_paths=True)
    functions = SLOTS if is_fused else 1
    classified = rows.map_batches(
        Function, fn_constructor_args=(model,), batch_size=BATCH, concurrency=functions, num_cpus=1
    )
    classified.write_parquet(output)


WAYS: dict[str, Callable[[str, str, str, bool], None]] = {"daft": with_daft, "ray": with_ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=WAYS)
    parser.add_argument("--as-guides", action="store_true", help="the library reads, decodes and resizes")
    for name in ("source", "model", "output"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    start = time.perf_counter()
    WAYS[options.library](options.source, options.model, options.output, not options.as_guides)
    seconds = time.perf_counter() - start
    images = len(list(Path(options.source).iterdir()))
    print(json.dumps({"images": images, "seconds": seconds, "images_per_second": images / seconds}))


if __name__ == "__main__":
    main()
