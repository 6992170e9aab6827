"""The four stages as they run in a task: functions from Arrow record batches to Arrow record batches.

Each stage has its output's schema beside it, keeps one row an image, and turns what is wrong with an image into the
row's `error`. A notebook runs one stage alone; `helpers.stages.task` fuses all four, so that pixels and raw outputs
stay in the worker. Executors import this package.
"""

from helpers.stages.inference import infer
from helpers.stages.postprocessing import postprocess
from helpers.stages.preprocessing import preprocess
from helpers.stages.reading import read_images
from helpers.stages.schemas import IMAGE_SCHEMA, MANIFEST_SCHEMA, RESULT_SCHEMA, TENSOR_SCHEMA, output_schema

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
