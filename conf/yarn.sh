#!/bin/sh
# Run the four stages on YARN, from a machine with this project and the cluster's configuration in HADOOP_CONF_DIR:
#   conf/yarn.sh SOURCE MODEL OUTPUT [--conf spark.NAME=VALUE ...] [--set KEY=VALUE ...]
#   DEPLOY=cluster conf/yarn.sh ...       the driver runs on a node too, which is how schedulers submit
#   conf/yarn.sh --prepare LOCATION       once: puts Spark and the archive where nodes reach and keep them (hdfs://...)
#   PREPARED=LOCATION conf/yarn.sh ...    starts from there, and uploads neither
#   PYTHON=/opt/python3 conf/yarn.sh train [--processes N] PROGRAM ARGUMENTS     trains; nodes have requirements.txt there
# The nodes need no Python and no package: they get the archive of `make pack`. All nodes must reach the locations:
# abfss:// for example, or a mount. MASTER=spark://HOST:7077 runs the same on a standalone cluster.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
if [ "${1:-}" = --prepare ] && [ $# = 2 ]; then
  exec "$python" "$root/conf/submission.py" --prepare "$2" "${ARCHIVE:-$root/out/pack/vision.tar.gz}"
fi
[ $# -ge 3 ] || { [ "${1:-}" = train ] && [ $# = 2 ]; } || { sed -n '2,9s/^# //p' "$0"; exit 2; }
deploy=${DEPLOY:-client} master=${MASTER:-yarn}
# What follows is put together from its end: the command, and before it the options of Spark that only some runs have.
if [ "$1" = train ]; then
  shift
  [ "$deploy" = client ] || { echo "error: train runs with its driver here, DEPLOY=client" >&2; exit 2; }
  set -- "$root/conf/submit.py" train --profile cluster --set spark.master="$master" "$@"
  set -- --conf spark.pyspark.python="${PYTHON:?the interpreter on the nodes, which has the packages}" "$@"
else
  source=$1 model=$2 output=$3
  shift 3
  # What a driver writes on a node is lost with it, so dashboards then go below the output.
  [ "$deploy" = client ] || set -- --set paths.runs="$output/runs" "$@"
  set -- "$root/conf/submit.py" run --profile cluster --set spark.master="$master" \
    --source "$source" --model "$model" --output "$output" "$@"
  set -- --archives "${ARCHIVE:-${PREPARED:-$root/out/pack}/vision.tar.gz}#environment" \
    --conf spark.pyspark.python=./environment/bin/python "$@"
  log=-Dlog4j2.configurationFile=environment/conf/log4j2.properties
  [ "$deploy" = client ] || set -- --conf spark.driver.extraJavaOptions="$log" "$@"
  [ "$master" != yarn ] || set -- --conf spark.executor.extraJavaOptions="$log" "$@"
fi
[ -z "${PREPARED:-}" ] || set -- --conf spark.yarn.archive="$PREPARED/spark.zip" "$@"
# Python workers outside the JVM decode and infer. An executor's overhead holds one worker per core, each of at most
# inference.memory_megabytes (2048). The executor's heap (HEAP) may stay small. The driver's Python lists and plans.
# The credential must not be in an argument: `ps`, Spark's environment page and the event log would show it. Use
# storage.credential=default (the nodes' identity) or keyvault:VAULT/NAME. If it is env:NAME, set NAME in the environment
# of the node managers and list it in yarn.nodemanager.env-whitelist, and export it here for the driver.
exec "$python" "$root/conf/submission.py" \
  --master "$master" \
  --deploy-mode "$deploy" \
  --name spark-vision \
  --conf spark.driver.memory="${DRIVER_HEAP:-1g}" \
  --conf spark.driver.memoryOverhead="${DRIVER_OVERHEAD:-2g}" \
  --conf spark.executor.instances="${EXECUTORS:-4}" \
  --conf spark.executor.cores="${CORES:-2}" \
  --conf spark.executor.memory="${HEAP:-1g}" \
  --conf spark.executor.memoryOverhead="${OVERHEAD:-4g}" \
  --conf spark.yarn.maxAppAttempts=1 \
  "$@"
