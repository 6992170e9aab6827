#!/bin/sh
# Run the four stages on Kubernetes, with driver and executors in the image of conf/Dockerfile:
#   make pack && docker build -f conf/Dockerfile -t REGISTRY/spark-vision . && docker push REGISTRY/spark-vision
#   IMAGE=REGISTRY/spark-vision conf/kubernetes.sh SOURCE MODEL OUTPUT [--conf spark.NAME=VALUE ...] [--set KEY=VALUE ...]
#   IMAGE=... conf/kubernetes.sh train [--processes N] PROGRAM ARGUMENTS     trains, in an image with torch (conf/Dockerfile);
#       this project's programs are in it, /opt/vision/notebooks/programs/NAME.py, and others lie on a volume
# Once per namespace, so that the driver may start pods:
#   kubectl create serviceaccount spark && kubectl create rolebinding spark --clusterrole=edit --serviceaccount=default:spark
# It needs kubectl, whose configuration says which cluster, and shows the log of the driver's pod while it runs.
# Locations are abfss:// and its like, or a volume that all pods mount. Each of these lines stands for driver and executor:
#   volume:    --conf spark.kubernetes.driver.volumes.persistentVolumeClaim.lake.mount.path=/lake
#              --conf spark.kubernetes.driver.volumes.persistentVolumeClaim.lake.options.claimName=CLAIM
#   secret:    --conf spark.kubernetes.driver.secretKeyRef.LAKE_KEY=SECRET:KEY   with --set storage.credential=env:LAKE_KEY
#   identity:  --conf spark.kubernetes.driver.label.azure.workload.identity/use=true   with ACCOUNT= the annotated account
#   template:  --conf spark.kubernetes.driver.podTemplateFile=FILE   for tolerations, sidecars and the like
# Of both at once: --conf spark.kubernetes.node.selector.NAME=VALUE
set -eu
[ $# -ge 3 ] || { [ "${1:-}" = train ] && [ $# = 2 ]; } || { sed -n '2,16s/^# //p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
: "${IMAGE:?the image made of conf/Dockerfile}"
api=${API:-$(kubectl config view --minify --output jsonpath='{.clusters[0].cluster.server}')}
if [ "$1" = train ]; then
  shift
  set -- train --profile cluster --set spark.master="k8s://$api" "$@"
else
  source=$1 model=$2 output=$3
  shift 3
  # Dashboards go below the output, because what a pod writes elsewhere is lost with it.
  set -- run --profile cluster --set spark.master="k8s://$api" --set paths.runs="$output/runs" \
    --source "$source" --model "$model" --output "$output" "$@"
fi
# A pod's memory is heap and overhead. The executors' overhead holds one Python worker per core, each of at most
# inference.memory_megabytes (2048); the driver's holds the listing. Lost pods are looked for more often than twice a
# minute, Spark's default.
exec "$root/.venv/bin/python" "$root/conf/submission.py" \
  --master "k8s://$api" \
  --deploy-mode cluster \
  --name spark-vision \
  --conf spark.kubernetes.namespace="${NAMESPACE:-default}" \
  --conf spark.kubernetes.authenticate.driver.serviceAccountName="${ACCOUNT:-spark}" \
  --conf spark.kubernetes.authenticate.executor.serviceAccountName="${ACCOUNT:-spark}" \
  --conf spark.kubernetes.container.image="$IMAGE" \
  --conf spark.kubernetes.executor.apiPollingInterval=5s \
  --conf spark.kubernetes.executor.missingPodDetectDelta=5s \
  --conf spark.pyspark.python=/opt/vision/bin/python \
  --conf spark.pyspark.driver.python=/opt/vision/bin/python \
  --conf spark.driver.extraJavaOptions=-Dlog4j2.configurationFile=/opt/vision/conf/log4j2.properties \
  --conf spark.executor.extraJavaOptions=-Dlog4j2.configurationFile=/opt/vision/conf/log4j2.properties \
  --conf spark.driver.cores="${DRIVER_CORES:-1}" \
  --conf spark.driver.memory="${DRIVER_HEAP:-1g}" \
  --conf spark.driver.memoryOverhead="${DRIVER_OVERHEAD:-2g}" \
  --conf spark.executor.instances="${EXECUTORS:-4}" \
  --conf spark.executor.cores="${CORES:-2}" \
  --conf spark.executor.memory="${HEAP:-1g}" \
  --conf spark.executor.memoryOverhead="${OVERHEAD:-4g}" \
  local:///opt/vision/conf/submit.py "$@"
