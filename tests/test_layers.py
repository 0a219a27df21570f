"""The layers hold: what each part of the code may import, and how long a job may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("models", "pipeline", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [path for path in FILES if path.parent.name != "rivals"]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "models"], ids=lambda path: path.name)
def test_models_know_neither_ray_nor_storage(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"ray", "boto3", "obstore", "pipeline", "jobs"}


def test_only_the_flow_imports_ray_data():
    assert [path.name for path in FILES if any(name.startswith("ray.data") for name in imports(path))] == ["flow.py"]


def test_a_stage_runs_without_ray():
    code = "import sys; from pipeline.steps import decode, fetch, stages; from pipeline.output import sink\n"
    code += "sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_actors_that_fetch_and_write_do_not_load_torch():
    code = "import sys; from pipeline.steps import decode, fetch, rows; from pipeline.output import sink\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_query_starts_without_torch_and_ray():
    code = "import sys, jobs.query; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_scan_is_driven_without_torch():
    code = (
        "import sys, jobs.scan\n"
        "from pipeline.plan import PLANS, load_plan; from pipeline.steps.nets import check_models\n"
        "[check_models(load_plan(path.stem)) for path in PLANS.glob('*.yaml')]\n"
        "sys.exit(', '.join({'torch', 'torchvision', 'scipy.stats', 'ray.train'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_job_is_short():
    for path in FILES:
        if path.parent.name == "jobs":
            assert len(path.read_text().splitlines()) < 100, path
