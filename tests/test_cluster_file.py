"""The cluster file, checked without a cloud: by Ray's own schema and by what it promises."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.aws.config import _create_default_inbound_rules
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture
def cluster(written: dict[str, Any]) -> dict[str, Any]:
    """As ``ray up`` sees it: with Ray's defaults filled in."""
    return prepare_config(written)


def test_ray_accepts_the_file(cluster):
    validate_config(cluster)


@pytest.mark.parametrize("missing", ["resources", "node_config"])
@pytest.mark.parametrize("group", ["head", "cpu", "gpu_spot"])
def test_ray_refuses_a_group_without(cluster, group, missing):
    broken = copy.deepcopy(cluster)
    del broken["available_node_types"][group][missing]
    with pytest.raises(ValidationError, match=missing):
        validate_config(broken)


def test_groups_state_their_resources(written):
    resources = {name: group["resources"] for name, group in written["available_node_types"].items()}
    assert resources == {"head": {"CPU": 0}, "cpu": {"CPU": 16, "decode": 16}, "gpu_spot": {"CPU": 8, "GPU": 1}}


def test_idle_cluster_shrinks_to_its_head(cluster):
    groups = cluster["available_node_types"]
    assert {name: group["min_workers"] for name, group in groups.items()} == dict.fromkeys(groups, 0)
    assert groups[cluster["head_node_type"]]["max_workers"] == 0
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert cluster["max_workers"] == sum(group["max_workers"] for group in groups.values())


def test_only_gpu_nodes_are_spot(written):
    markets = {
        name: group["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, group in written["available_node_types"].items()
    }
    assert markets == {"head": None, "cpu": None, "gpu_spot": "spot"}


def test_nodes_run_one_ubuntu(written):
    """And so one Python: Ray refuses nodes that differ. The GPU node's image brings the driver."""
    images = {name: group["node_config"]["ImageId"] for name, group in written["available_node_types"].items()}
    releases = {name: re.findall(r"ubuntu\D*(\d\d\.\d\d)", image) for name, image in images.items()}
    assert releases == {"head": ["24.04"], "cpu": ["24.04"], "gpu_spot": ["24.04"]}
    assert [name for name, image in images.items() if "nvidia-driver" in image] == ["gpu_spot"]


def test_nodes_install_the_lock_and_nothing_else(cluster):
    (mount,) = cluster["file_mounts"].items()
    assert mount == ("/home/ubuntu/requirements.lock", "requirements.lock")
    for commands in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        installs = [command for command in commands if "pip install" in command]
        assert installs == ["~/venv/bin/pip install --quiet --require-hashes -r ~/requirements.lock"]


def test_the_lock_pins_the_ray_that_validated_the_file():
    lock = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"^ray==(\S+)", lock, re.MULTILINE) == [version("ray")]


def test_ssh_is_the_only_way_in(cluster):
    extra_rules = cluster["provider"]["security_group"].get("IpPermissions", [])
    rules = _create_default_inbound_rules({"sg-cluster"}, extra_rules)
    assert [rule["FromPort"] for rule in rules if rule.get("IpRanges")] == [22]
    starts = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert re.findall(r"--dashboard-host=(\S+)", starts) == ["127.0.0.1"]


def test_file_holds_no_credentials(written):
    text = (ROOT / "ray_cluster.yaml").read_text() + json.dumps(written)
    secrets = (r"AKIA[0-9A-Z]{16}", r"aws_\w*(key|token|credentials)", r"ssh_private_key", r"arn:aws", r"\b\d{12}\b")
    assert [secret for secret in secrets if re.search(secret, text, re.IGNORECASE)] == []
    roles = {
        name: group["node_config"]["IamInstanceProfile"] for name, group in written["available_node_types"].items()
    }
    assert roles == {
        "head": {"Name": "dorfman-head"},
        "cpu": {"Name": "dorfman-worker"},
        "gpu_spot": {"Name": "dorfman-worker"},
    }
