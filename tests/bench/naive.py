"""The way most guides show: `binaryFile`, a pandas UDF that decodes, `predict_batch_udf`; prints one JSON line.

Same images, bundle, resize and arithmetic as the pipeline; all else is left at Spark's and OpenVINO's defaults.
"""

import argparse
import json
import os
import sys
import time
from functools import partial

import numpy as np
import pandas as pd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, FloatType

    from helpers.bundle.manifest import load_bundle
    from helpers.images.decoding import load
    from helpers.storage import open_storage

    spec = load_bundle(open_storage(options.model)).manifest.input
    spark = SparkSession.builder.master("local[2]").config("spark.driver.memory", "4g").getOrCreate()
    start = time.perf_counter()

    @pandas_udf(ArrayType(FloatType()))
    def to_array(contents: pd.Series) -> pd.Series:
        return pd.Series([load(c, spec, 2**28)[0].astype(np.float32).ravel() for c in contents])

    classify = predict_batch_udf(
        partial(make_predict, options.model),
        return_type=ArrayType(FloatType()),
        batch_size=64,
        input_tensor_shapes=[list(spec.shape)],
    )
    images = spark.read.format("binaryFile").load(options.source)
    results = images.select("path", to_array("content").alias("image")).select(
        "path", classify("image").alias("logits")
    )
    results.write.mode("overwrite").parquet(options.output)
    seconds = time.perf_counter() - start
    count = spark.read.parquet(options.output).count()
    print(json.dumps({"images": count, "seconds": seconds, "images_per_second": count / seconds}))


def make_predict(location: str):
    import openvino as ov

    from helpers.bundle.manifest import load_bundle
    from helpers.storage import open_storage

    bundle = load_bundle(open_storage(location))
    model = ov.Core().read_model(model=bundle.read("model.xml"), weights=bundle.read("model.bin"))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": bundle.manifest.arithmetic})
    return lambda images: compiled(images.astype(np.uint8))[0]


if __name__ == "__main__":
    main()
