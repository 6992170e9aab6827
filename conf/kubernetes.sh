#!/bin/sh
# Run the four stages on Kubernetes, with driver and executors in the image of conf/Dockerfile:
#   docker build -f conf/Dockerfile -t REGISTRY/spark-vision . && docker push REGISTRY/spark-vision
#   IMAGE=REGISTRY/spark-vision API=https://HOST:6443 conf/kubernetes.sh SOURCE MODEL OUTPUT [--set KEY=VALUE ...]
# Once per namespace, so that the driver may start pods:
#   kubectl create serviceaccount spark && kubectl create rolebinding spark --clusterrole=edit --serviceaccount=default:spark
# Locations are abfss:// (workload identity, or a secret as an environment variable), or a volume that all pods mount.
set -eu
[ $# -ge 3 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
source=$1 model=$2 output=$3
shift 3
export PYSPARK_DRIVER_PYTHON="$root/.venv/bin/python" # spark-submit finds Spark by it
# A pod's memory is heap and overhead. The overhead holds one Python worker per core, each of at most
# inference.memory_megabytes (2048). The log of the driver's pod has the JSON summary.
# Dashboards go below the output, because what a pod writes elsewhere is lost with it.
# spark.kubernetes.{driver,executor}.secretKeyRef.NAME=SECRET:KEY sets a credential that is an environment variable.
exec "$root/.venv/bin/spark-submit" \
  --master "k8s://${API:?the address of the cluster, https://HOST:6443}" \
  --deploy-mode cluster \
  --name spark-vision \
  --conf spark.kubernetes.namespace="${NAMESPACE:-default}" \
  --conf spark.kubernetes.authenticate.driver.serviceAccountName="${ACCOUNT:-spark}" \
  --conf spark.kubernetes.container.image="${IMAGE:?the image made of conf/Dockerfile}" \
  --conf spark.executor.instances="${EXECUTORS:-4}" \
  --conf spark.executor.cores="${CORES:-2}" \
  --conf spark.executor.memory="${HEAP:-1g}" \
  --conf spark.executor.memoryOverhead="${OVERHEAD:-4g}" \
  local:///opt/vision/conf/submit.py run --profile cluster --set spark.master="k8s://$API" \
  --set paths.runs="$output/runs" \
  --source "$source" --model "$model" --output "$output" "$@"
