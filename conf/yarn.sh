#!/bin/sh
# Run the four stages on YARN, from a machine with this project and the cluster's configuration in HADOOP_CONF_DIR:
#   conf/yarn.sh SOURCE MODEL OUTPUT [--conf spark.NAME=VALUE ...] [--set KEY=VALUE ...]
#   DEPLOY=cluster conf/yarn.sh ...       the driver runs on a node too, which is how schedulers submit
#   conf/yarn.sh --prepare LOCATION       once: puts Spark and the archive where nodes reach and keep them (hdfs://...)
#   PREPARED=LOCATION conf/yarn.sh ...    starts from there, and uploads neither
# The nodes need no Python and no package: they get the archive of `make pack`. All nodes must reach the locations:
# abfss:// for example, or a mount. MASTER=spark://HOST:7077 runs the same on a standalone cluster.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
if [ "${1:-}" = --prepare ] && [ $# = 2 ]; then
  exec "$python" "$root/conf/submission.py" --prepare "$2" "${ARCHIVE:-$root/out/pack/vision.tar.gz}"
fi
[ $# -ge 3 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
source=$1 model=$2 output=$3
shift 3
# In cluster mode what the driver writes on its node is lost with it, so dashboards go below the output.
[ "${DEPLOY:-client}" = client ] || set -- --set paths.runs="$output/runs" "$@"
# Started by --prepare's files, or uploading this machine's.
[ -z "${PREPARED:-}" ] || set -- --conf spark.yarn.archive="$PREPARED/spark.zip" "$@"
archive=${ARCHIVE:-${PREPARED:-$root/out/pack}/vision.tar.gz}
# Python workers outside the JVM decode and infer. An executor's overhead holds one worker per core, each of at most
# inference.memory_megabytes (2048). The executor's heap (HEAP) may stay small. The driver's Python lists and plans.
# The credential must not be in an argument: `ps`, Spark's environment page and the event log would show it. Use
# storage.credential=default (the nodes' identity) or keyvault:VAULT/NAME. If it is env:NAME, set NAME in the environment
# of the node managers and list it in yarn.nodemanager.env-whitelist, and export it here for the driver.
if [ "${DEPLOY:-client}" = client ]; then
  driver=$python # the driver runs here, in .venv
else
  driver=./environment/bin/python
  set -- --conf spark.driver.extraJavaOptions=-Dlog4j2.configurationFile=environment/conf/log4j2.properties "$@"
fi
[ -n "${MASTER:-}" ] ||
  set -- --conf spark.executor.extraJavaOptions=-Dlog4j2.configurationFile=environment/conf/log4j2.properties "$@"
exec "$python" "$root/conf/submission.py" \
  --master "${MASTER:-yarn}" \
  --deploy-mode "${DEPLOY:-client}" \
  --name spark-vision \
  --archives "$archive#environment" \
  --conf spark.pyspark.python=./environment/bin/python \
  --conf spark.pyspark.driver.python="$driver" \
  --conf spark.driver.memory="${DRIVER_HEAP:-1g}" \
  --conf spark.driver.memoryOverhead="${DRIVER_OVERHEAD:-2g}" \
  --conf spark.executor.instances="${EXECUTORS:-4}" \
  --conf spark.executor.cores="${CORES:-2}" \
  --conf spark.executor.memory="${HEAP:-1g}" \
  --conf spark.executor.memoryOverhead="${OVERHEAD:-4g}" \
  --conf spark.yarn.maxAppAttempts=1 \
  "$root/conf/submit.py" run --profile cluster --set spark.master="${MASTER:-yarn}" \
  --source "$source" --model "$model" --output "$output" "$@"
