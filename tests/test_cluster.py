"""Scans on nodes of different kinds: who runs where, when memory is short, and when all GPU nodes are gone."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import QUICK, small_plan

STORE_BYTES = 100_000_000


class Nodes:
    """A node that fetches and decodes, on which the driver is, and one with a GPU that only Ray believes in."""

    def __init__(self, store_bytes: int) -> None:
        from ray.cluster_utils import Cluster

        size = {"object_store_memory": store_bytes}
        self.gpu_size = size | {"num_cpus": 2, "num_gpus": 1}
        head = size | {"num_cpus": 2, "resources": {"decode": 2}, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.gpu = self.cluster.add_node(**self.gpu_size)

    @property
    def cpu(self):
        return self.cluster.head_node

    def actors(self) -> dict[str, set[str]]:
        """By operator the ids of the nodes that its actors have ever been on, as Ray's own table has it."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(GcsClientOptions.create(self.cluster.address, None, True, False))
        nodes = defaultdict(set)
        for actor in state.actor_table(None, None, None).values():
            nodes[actor["ActorClassName"]].add(actor["Address"]["NodeID"])
        return nodes
