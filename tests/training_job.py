"""A training job as a user submits it: trains a program on Spark, and prints its result as the last line.

python tests/training_job.py PROCESSES PROGRAM '["--epochs", "2"]' [spark.master=...]...
"""

import json
import sys

from helpers.config import load_config
from helpers.session import get_spark
from helpers.training import train_on_spark

if __name__ == "__main__":
    processes, program, arguments, *overrides = sys.argv[1:]
    spark = get_spark(load_config("cluster", **dict(override.split("=", 1) for override in overrides)))
    result = train_on_spark(spark, program, json.loads(arguments), int(processes))
    spark.stop()
    print(json.dumps(result))
