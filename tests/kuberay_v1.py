"""What KubeRay takes as a RayJob (ray.io/v1), as facts: names, types and required fields, for tests without a cluster.

Read off the operator's types as of KubeRay 1.3. Later versions add fields; ``deletionPolicy``, which they have renamed,
is left out. What is Kubernetes' own (pod templates, a container's fields) is checked against Kubernetes' schemas.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.34"

TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
NUMBER = {"type": "number"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
OBJECT = {"type": "object"}
LIST = {"type": "array"}


def _object(required: tuple[str, ...] = (), **fields: dict) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


AUTOSCALER_OPTIONS = _object(
    resources=OBJECT,
    image=TEXT,
    imagePullPolicy=TEXT,
    securityContext=OBJECT,
    idleTimeoutSeconds=INT32,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    env=LIST,
    envFrom=LIST,
    volumeMounts=LIST,
)
HEAD_GROUP_SPEC = _object(
    ("rayStartParams", "template"),
    template=OBJECT,
    headService=OBJECT,
    enableIngress=FLAG,
    rayStartParams=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)
WORKER_GROUP_SPEC = _object(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    suspend=FLAG,
    groupName=TEXT,
    replicas=INT32,
    minReplicas=INT32,
    maxReplicas=INT32,
    idleTimeoutSeconds=INT32,
    rayStartParams=TEXTS,
    template=OBJECT,
    scaleStrategy=_object(workersToDelete={"type": "array", "items": TEXT}),
    numOfHosts=INT32,
)
RAY_CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    suspend=FLAG,
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    autoscalerOptions=AUTOSCALER_OPTIONS,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=OBJECT,
    headGroupSpec=HEAD_GROUP_SPEC,
    rayVersion=TEXT,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP_SPEC},
)
RAY_JOB_SPEC = _object(
    activeDeadlineSeconds=INT32,
    backoffLimit=INT32,
    rayClusterSpec=RAY_CLUSTER_SPEC,
    submitterPodTemplate=OBJECT,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=_object(backoffLimit=INT32),
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=INT32,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=OBJECT,
    spec=RAY_JOB_SPEC,
)


def validate_ray_job(job: dict[str, Any]) -> None:
    """Raises jsonschema's ValidationError, or kubernetes_validate's, which is one."""
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        validate_pod(group["template"])
    if "submitterPodTemplate" in job["spec"]:
        validate_pod(job["spec"]["submitterPodTemplate"])
    containers_own = {"resources", "imagePullPolicy", "securityContext", "env", "envFrom", "volumeMounts"}
    options = cluster.get("autoscalerOptions", {})
    container = {"name": "autoscaler"} | {name: options[name] for name in containers_own & options.keys()}
    validate_pod({"spec": {"containers": [container]}})


def validate_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}} | template
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
