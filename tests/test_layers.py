"""The layers hold: what each part of the code may import, and how long a job may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("models", "pipeline", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = [path for path in FILES if path.parent.name != "rivals"]

SHARED = "pipeline"
"""What lies in ``pipeline/`` itself, but the flow."""
MAY_IMPORT = {
    SHARED: "",
    "listing": "",
    "output": "listing",
    "past": "listing output",
    "steps": "listing past",
    "reporting": "listing output past steps",
    "review": "listing output past steps reporting",
    "labels": "listing steps review",
    "flow": "listing output past steps reporting labels",
    "run": "listing output past steps reporting labels flow",
    "planning": "steps",
    "training": "steps labels flow run planning",
    "tables": "listing output past reporting review",
    "bench": "listing output steps labels flow run planning training",
}
"""Packages of ``pipeline/`` in the order of their layers, and which others each may import beside what they share."""
PACKAGES = sorted({*MAY_IMPORT} - {SHARED, "flow"})


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str:
    """``run`` of ``pipeline.run.scan``, and ``pipeline`` of ``pipeline.schema``."""
    name = module.split(".")[1]
    return name if name in MAY_IMPORT else SHARED


def forbidden(module: str, imported: set[str]) -> list[str]:
    """What of ``imported`` a module of the pipeline may not import."""
    own = package_of(module)
    allowed = {own, SHARED, *MAY_IMPORT[own].split()}
    return sorted(name for name in imported if name.startswith("pipeline.") and package_of(name) not in allowed)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "models"], ids=lambda path: path.name)
def test_models_know_neither_ray_nor_storage(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"ray", "boto3", "obstore", "pipeline", "jobs"}


def test_only_the_flow_imports_ray_data():
    assert [path.name for path in FILES if any(name.startswith("ray.data") for name in imports(path))] == ["flow.py"]


def test_ray_is_known_where_a_scan_runs_or_tells_and_where_nets_train():
    """Steps, tables and pages work without it, and are tested so."""
    know = [path for path in FILES if "ray" in {name.split(".")[0] for name in imports(path)}]
    places = {path.stem if path.parent.name == "pipeline" else path.parent.name for path in know}
    assert places == {"flow", "reporting", "run", "training"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_none_behind_it(package):
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    own = {name: path for name, path in modules.items() if name.startswith("pipeline.") and package_of(name) == package}
    assert own, f"{package} has no files"
    assert {name: wrong for name, path in own.items() if (wrong := forbidden(name, imports(path)))} == {}


def test_an_import_of_a_later_package_is_found():
    assert forbidden("pipeline.steps.fetch", {"pipeline.run.scan", "pipeline.past.contents", "torch"}) == [
        "pipeline.run.scan"
    ]
    assert forbidden("pipeline.schema", {"pipeline.flow", "pipeline.errors"}) == ["pipeline.flow"]
    assert forbidden("pipeline.planning.field", {"pipeline.steps.layout"}) == []


def test_packages_stand_in_the_order_of_their_layers():
    order = list(MAY_IMPORT)
    for package, others in MAY_IMPORT.items():
        assert set(others.split()) <= set(order[: order.index(package)]), package


def test_a_folder_with_code_is_a_package_with_a_place_in_the_order():
    assert sorted({path.parent.name for path in FILES if path.parent.parent.name == "pipeline"}) == PACKAGES


def test_the_map_of_the_code_has_every_package_in_this_order():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Layers")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)(?:\.py)?` \|", section, re.MULTILINE)
    assert rows == [package for package in MAY_IMPORT if package != SHARED]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_holds_and_may_import(package):
    """And does nothing else: whoever imports one file of it, as a decoder's child does, loads no other."""
    tree = ast.parse((ROOT / "pipeline" / package / "__init__.py").read_text())
    assert len(tree.body) == 1
    says = re.search(r"May import\s(.+)\.$", ast.get_docstring(tree) or "", re.DOTALL)
    assert says and re.findall(r"`(\w+)`", says[1]) == MAY_IMPORT[package].split()


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
