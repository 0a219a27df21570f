"""The files for Kubernetes and the plan beside them, checked without a cluster: by schemas, and by Ray's autoscaler."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

from jobs.cli import parse
from jobs.scan import JobConfig
from pipeline.flow import pools
from pipeline.plan import load_plan
from tests.kuberay_v1 import KUBERNETES, validate_ray_job

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs/deploy"
PLAN = load_plan(str(DEPLOY / "plan.yaml"))
NIGHT = "0000-00-00"


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())


@pytest.fixture
def nightly() -> dict[str, dict[str, Any]]:
    """The objects of the CronJob's file, by kind and name."""
    objects = yaml.safe_load_all((DEPLOY / "kuberay-cronjob.yaml").read_text())
    return {f"{entry['kind']}/{entry['metadata']['name']}": entry for entry in objects}


def at(job: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The container of a field, and the field's name in it."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place: Any = job["spec"]
    for part in parents:
        place = place[part]
    return place, last


def test_kuberay_and_kubernetes_accept_the_ray_job(job):
    validate_ray_job(job)


WORKER = "rayClusterSpec.workerGroupSpecs.1"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("entryPoint", "python", "'entryPoint' was unexpected"),
        ("backoffLimit", "2", "not of type 'integer'"),
        ("submissionMode", "K8SJobMode", "not one of"),
        ("rayClusterSpec.enableInTreeAutoScaling", True, "'enableInTreeAutoScaling' was unexpected"),
        ("rayClusterSpec.autoscalerOptions.upscalingMode", "Fast", "not one of"),
        ("rayClusterSpec.autoscalerOptions.resources.limits", ["4"], "not of type 'object'"),
        (f"{WORKER}.maxReplica", 3, "'maxReplica' was unexpected"),
        (f"{WORKER}.rayStartParams.num-gpus", 1, "1 is not of type 'string'"),
        (f"{WORKER}.template.spec.toleration", [], "'toleration' was unexpected"),
        (f"{WORKER}.template.spec.containers.0.resources.limit", {}, "'limit' was unexpected"),
        (f"{WORKER}.template.spec.containers.0.securityContext.runAsUser", "ray", "not of type 'integer'"),
        ("rayClusterSpec.headGroupSpec.template.spec.volumes.0.configmap", {}, "'configmap' was unexpected"),
    ],
)
def test_a_ray_job_with_a_mistake_is_refused(job, path, value, words):
    place, last = at(job, path)
    place[last] = value
    with pytest.raises(ValidationError, match=words):
        validate_ray_job(job)


@pytest.mark.parametrize(
    "path", [f"{WORKER}.groupName", f"{WORKER}.rayStartParams", "rayClusterSpec.headGroupSpec.template"]
)
def test_a_ray_job_that_lacks_something_is_refused(job, path):
    place, last = at(job, path)
    del place[last]
    with pytest.raises(ValidationError, match=f"{last!r} is a required property"):
        validate_ray_job(job)


def test_kubernetes_accepts_what_the_nights_need_and_bites(nightly):
    for entry in nightly.values():
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    broken = copy.deepcopy(nightly["CronJob/dorfman-nightly"])
    broken["spec"]["concurrencyPolicies"] = broken["spec"].pop("concurrencyPolicy")
    with pytest.raises(ValidationError, match="'concurrencyPolicies' was unexpected"):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_a_night_may_create_and_look_at_scans_and_nothing_else(nightly):
    assert nightly["Role/dorfman-nightly"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    binding = nightly["RoleBinding/dorfman-nightly"]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", "dorfman-nightly")
    assert [(subject["kind"], subject["name"]) for subject in binding["subjects"]] == [
        ("ServiceAccount", "dorfman-nightly")
    ]
    pod = nightly["CronJob/dorfman-nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert f"ServiceAccount/{pod['serviceAccountName']}" in nightly and pod["serviceAccountName"] == "dorfman-nightly"


def test_scans_run_under_a_name_of_their_own_and_only_the_head_talks_to_kubernetes(job, nightly):
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert [pod["serviceAccountName"] for pod in pods] == ["dorfman-scan"] * 3
    assert "ServiceAccount/dorfman-scan" in nightly
    # The autoscaler beside the head starts and ends pods.
    assert [pod.get("automountServiceAccountToken", True) for pod in pods] == [True, False, False]


def test_nights_do_not_overlap(job, nightly):
    cron = nightly["CronJob/dorfman-nightly"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    hour = int(cron["schedule"].split()[1])
    lasts = cron["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    latest = hour * 3600 + cron["startingDeadlineSeconds"] + lasts
    tries = job["spec"]["backoffLimit"] + 1
    assert tries * job["spec"]["activeDeadlineSeconds"] < lasts and latest <= 24 * 3600


@pytest.mark.parametrize(("state", "created", "code"), [("Complete", 0, 0), ("Failed", 0, 1), ("Complete", 1, 0)])
def test_the_night_runs_the_scan_of_the_day_and_ends_as_it_does(job, nightly, tmp_path, state, created, code):
    """Its own shell script, with a kubectl that notes what it is given. ``created``: 1 when there is one."""
    (tmp_path / "kubectl").write_text(
        f'#!/bin/sh\nif [ "$1" = create ]; then cat > {tmp_path}/created; exit {created}; fi\necho {state}\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    (container,) = nightly["CronJob/dorfman-nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace("/etc/dorfman/rayjob.yaml", str(DEPLOY / "kuberay-rayjob.yaml"))
    before = date.fromtimestamp(0).isoformat()
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(
        [*container["command"], script], env={"PATH": path}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == code, done.stderr
    made = yaml.safe_load((tmp_path / "created").read_text())
    night = made["metadata"]["name"].removeprefix("dorfman-")
    assert before < date.fromisoformat(night).isoformat()
    assert made["spec"]["entrypoint"] == job["spec"]["entrypoint"].replace(NIGHT, night)
    validate_ray_job(made)
    assert len(made["metadata"]["name"]) <= 47, "KubeRay refuses longer ones"


def test_the_entrypoint_is_a_scan_that_a_retry_resumes(job, tmp_path):
    spec = job["spec"]
    program, arguments = shlex.split(spec["entrypoint"])[:3], shlex.split(spec["entrypoint"])[3:]
    assert program == ["python", "-m", "jobs.scan"]
    (tmp_path / "nightly.yaml").write_text("source: s3://b/in\noutput: s3://b/out\nplan: /etc/dorfman/plan.yaml\n")
    arguments = [str(tmp_path / "nightly.yaml") if value.startswith("/etc") else value for value in arguments]
    config = parse("jobs.scan", JobConfig, arguments)
    assert (config.run_id, config.plan) == (NIGHT, "/etc/dorfman/plan.yaml")
    assert spec["backoffLimit"] == 2 and spec["shutdownAfterJobFinishes"] is True


def test_every_container_states_what_it_takes_and_may_take(job, nightly):
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    pods.append(nightly["CronJob/dorfman-nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"])
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for group in cluster["workerGroupSpecs"]:
        # Ray believes what it is told: more CPUs than the pod may use would be slow, not refused.
        assert (
            group["rayStartParams"]["num-cpus"]
            == group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
        )
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]


def kuberay(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler reads from the RayCluster that KubeRay makes of the job."""
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]}
    )


def aws() -> dict[str, Any]:
    return prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))


def started(cluster: dict[str, Any], bundles: list[dict[str, float]]) -> tuple[dict[str, int], int]:
    """Which nodes Ray's autoscaler starts when a job asks for this, from nothing; how many wishes it cannot fulfil."""
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    wanted = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in bundles])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=wanted)],
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    return dict(nodes - Counter([cluster["head_node_type"]])), len(reply.infeasible_cluster_resource_constraints)


def minimum() -> list[dict[str, float]]:
    return [pool.needs for pool in pools(PLAN) for _ in range(pool.actors.min)]


def test_the_autoscaler_reads_the_groups_as_they_are_meant(job):
    nodes = kuberay(job)["available_node_types"]
    counted = {name: {k: v for k, v in node["resources"].items() if k != "memory"} for name, node in nodes.items()}
    assert counted == {"headgroup": {"CPU": 0}, "cpu": {"CPU": 15, "decode": 15}, "gpu": {"CPU": 7, "GPU": 1}}


@pytest.mark.parametrize(("where", "gpu"), [("kuberay", "gpu"), ("aws", "gpu_spot")])
def test_from_zero_the_plan_starts_one_node_of_each_kind_and_fits(job, where, gpu):
    cluster = kuberay(job) if where == "kuberay" else aws()
    nodes, lacking = started(cluster, minimum())
    assert lacking == 0 and nodes == {"cpu": 1, gpu: 1}
    # What no node advertises starts none, however many are allowed.
    assert started(cluster, [{"CPU": 1, "encode": 1}]) == ({}, 1)


@pytest.mark.parametrize("where", ["kuberay", "aws"])
def test_at_its_largest_the_plan_fills_the_cluster_and_not_more(job, where):
    """Pools whose upper bounds do not fit would wait for nodes that never come; those far below leave nodes unused."""
    cluster = kuberay(job) if where == "kuberay" else aws()
    largest = [pool.needs for pool in pools(PLAN) for _ in range(pool.actors.max)]
    room = {
        kind: sum(
            node["max_workers"] * node["resources"].get(kind, 0) for node in cluster["available_node_types"].values()
        )
        for kind in ("GPU", "decode")
    }
    assert sum(needs.get("GPU", 0) for needs in largest) <= room["GPU"]
    assert sum(needs.get("decode", 0) for needs in largest) >= room["decode"]


def test_the_plan_is_the_shipped_one_with_nets_for_gpus():
    shipped = load_plan("emblem")
    stages = tuple(stage.model_copy(update={"model": stage.model.removesuffix("-int8")}) for stage in shipped.stages)
    assert PLAN.version != shipped.version
    assert PLAN.version == shipped.model_copy(update={"name": PLAN.name, "stages": stages}).version


def test_gpu_stages_and_decoders_ask_for_different_nodes():
    for pool in pools(PLAN):
        assert ("GPU" in pool.needs) != ("decode" in pool.needs)


def test_the_image_installs_the_lock_and_runs_as_nobody_special():
    text = (DEPLOY / "Dockerfile").read_text()
    assert "pip install --no-cache-dir --require-hashes -r requirements.lock" in text
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000"
    copied = {name for line in re.findall(r"^COPY (.+)", text, re.MULTILINE) for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied) and {"pipeline", "jobs", "models"} <= copied


def test_files_hold_no_secrets():
    for path in DEPLOY.iterdir():
        text = path.read_text()
        found = (
            r"AKIA[0-9A-Z]{16}",
            r"(?i)aws_\w*(key|token)\w*[\"']?\s*[:=]\s*\S",
            r"kind: Secret",
            r"secretKeyRef",
            r"\b\d{12}\b",
        )
        assert [secret for secret in found if re.search(secret, text)] == [], path
