"""A training job as a user submits it: trains the classifier on Spark, and prints its result as the last line.

python tests/training_job.py PROCESSES DATA RUN_DIR '{"epochs": 2}' [spark.master=...]...
"""

import json
import sys

from helpers.training.classifier import TrainingSettings
from helpers.training.distributed import train_on_spark

from helpers.config import load_config
from helpers.session import get_spark

if __name__ == "__main__":
    processes, data, run_dir, settings, *overrides = sys.argv[1:]
    spark = get_spark(load_config("cluster", **dict(override.split("=", 1) for override in overrides)))
    result = train_on_spark(spark, TrainingSettings(**json.loads(settings)), data, run_dir, int(processes))
    spark.stop()
    print(json.dumps(result))
