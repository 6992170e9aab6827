"""The four stages as they run in a task: functions from Arrow record batches to Arrow record batches.

Each stage has its output's schema beside it, keeps one row an image, and turns what is wrong with an image into the
row's `error`. A notebook runs one stage alone; `helpers.pipeline.task` fuses all four, so that pixels and raw outputs
stay in the worker. Executors import this package.
"""

from helpers.pipeline.inference import infer
from helpers.pipeline.postprocessing import postprocess
from helpers.pipeline.preprocessing import preprocess
from helpers.pipeline.reading import read_images
from helpers.pipeline.schemas import IMAGE_SCHEMA, MANIFEST_SCHEMA, RESULT_SCHEMA, TENSOR_SCHEMA, output_schema

__all__ = [
    "IMAGE_SCHEMA",
    "MANIFEST_SCHEMA",
    "RESULT_SCHEMA",
    "TENSOR_SCHEMA",
    "infer",
    "output_schema",
    "postprocess",
    "preprocess",
    "read_images",
]
