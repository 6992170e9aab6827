#!/bin/sh
# Run the four stages on YARN, from a machine with this project and the cluster's configuration in HADOOP_CONF_DIR:
#   conf/yarn.sh SOURCE MODEL OUTPUT [--set KEY=VALUE ...]
# The nodes need no Python and no package: they get the archive of `make pack`. All nodes must reach the locations:
# abfss:// for example, or a mount. MASTER=spark://HOST:7077 runs the same on a standalone cluster.
set -eu
[ $# -ge 3 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
source=$1 model=$2 output=$3
shift 3
export PYSPARK_DRIVER_PYTHON="$root/.venv/bin/python" # spark-submit finds Spark by it
# Python workers outside the JVM decode and infer. An executor's overhead holds one worker per core, each of at most
# inference.memory_megabytes (2048). The executor's heap (executor.memory) may stay small.
# Client mode: the driver runs here, in .venv, and lists, plans and publishes.
# The credential must not be in an argument: `ps`, Spark's environment page and the event log would show it. Use
# storage.credential=default (the nodes' identity) or keyvault:VAULT/NAME. If it is env:NAME, set NAME in the environment
# of the node managers and list it in yarn.nodemanager.env-whitelist, and export it here for the driver.
exec "$root/.venv/bin/spark-submit" \
  --master "${MASTER:-yarn}" \
  --deploy-mode client \
  --driver-java-options "-Dlog4j2.configurationFile=file://$root/conf/log4j2.properties" \
  --archives "${ARCHIVE:-$root/out/pack/executors.tar.gz}#environment" \
  --conf spark.pyspark.python=./environment/bin/python \
  --conf spark.pyspark.driver.python="$root/.venv/bin/python" \
  --conf spark.executor.instances="${EXECUTORS:-4}" \
  --conf spark.executor.cores="${CORES:-2}" \
  --conf spark.executor.memory="${HEAP:-1g}" \
  --conf spark.executor.memoryOverhead="${OVERHEAD:-4g}" \
  --conf spark.yarn.maxAppAttempts=1 \
  "$root/conf/submit.py" run --profile cluster --set spark.master="${MASTER:-yarn}" \
  --source "$source" --model "$model" --output "$output" "$@"
