"""The process that Spark's workers of this machine are forked from, with everything imported that a run's tasks need.

    python -m helpers.pipeline.daemon pyspark.worker       as the JVM starts it (`spark.python.daemon.module`)

From pyspark's own daemon each worker would import that for itself. From this one they share it, and its memory.
"""

import contextlib
import gc
import sys

from pyspark import daemon

# A process must have one thread when it is forked. OpenVINO's converter of models, which no task needs, starts another;
# OpenVINO does without it.
sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]
with contextlib.suppress(ImportError):  # a task that needs what is missing says so
    import openvino  # noqa: F401

    import helpers.pipeline.task  # noqa: F401
del sys.modules["openvino.tools.ovc"]
# Garbage collection in a worker would otherwise write to, and so copy, the pages of all these objects.
gc.collect()
gc.freeze()

if __name__ == "__main__":
    daemon.manager()
