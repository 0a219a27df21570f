"""A scan without work: listing, manifest, streaming, tables and record are real, but no image is fetched.

What is left is the driver and the writing of rows, so that millions of keys take minutes. For benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from typing import Any

from pipeline.plan import Plan, load_plan
from pipeline.steps.fetch import OPERATOR, Fetcher
from pipeline.window import GroupTest, Window, Work


class IdleFetcher(Fetcher):
    """Clears every image without a request, by a test of the plan's first stage that nobody has made."""

    def __init__(self, plan: Plan, *args: Any) -> None:
        super().__init__(*args)
        self.stage, self.scores = plan.stages[0].name, [0.0] * len(plan.categories)

    def fetch(self, window: Window) -> Window:
        for number, image in enumerate(window.images):
            # Rows are as large as real ones, and as hard to compress.
            image.sha256 = hashlib.sha256(image.image_id.encode()).hexdigest()
            name = f"{window.window}.{self.stage}.{number}"
            image.tests = [GroupTest(stage=self.stage, round=0, group_id=name, group_size=1, scores=self.scores)]
            image.decide("cleared")
        window.work.append(Work(operator=OPERATOR, images_in=len(window.images)))
        return window


def scan_idle() -> None:
    """Runs the scan whose configuration is the first argument, as JSON; it may raise what a scan raises."""
    from pipeline.run.scan import ScanConfig, run_scan  # noqa: PLC0415  a fetching actor needs no torch

    config = ScanConfig(**json.loads(sys.argv[1]))
    run_scan(config, partial(IdleFetcher, load_plan(config.plan)))
