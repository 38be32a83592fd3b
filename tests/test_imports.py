"""Who may import whom (design: lower layers never import higher ones), checked on the source of the whole repo.

A unit is a module or package directly under `verl`, or another top-level package. Every import counts, also inside a
function or under TYPE_CHECKING: a dependency that is loaded late is still a dependency.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("verl", "generator_llms", "data_preprocess")

BASE = {"types", "errors", "typed", "config"}
DATA = {"batch", "records", "trajectories"}
PARTS = {"agent", "rewards", "retrieval", "generator_llms"}
COMPUTE = {"single_controller", "workers"}
BELOW_EDGE = BASE | DATA | PARTS | COMPUTE | {"algorithms", "services"}
EDGE = {"data_preprocess", "evaluation", "viewer"}

ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "algorithms": set(),
    "supervise": set(),
    "typed": {"errors"},
    "config": {"errors", "typed"},
    "batch": {"types"},
    "records": {"types", "errors"},
    "trajectories": {"types", "errors", "typed"},
    "services": {"errors"},
    "agent": BASE | {"batch"},
    "rewards": BASE,
    "retrieval": BASE,
    "generator_llms": BASE,
    "single_controller": BASE | DATA | PARTS | COMPUTE | {"algorithms"},
    "workers": BASE | DATA | PARTS | COMPUTE | {"algorithms"},
    "data_preprocess": BELOW_EDGE | EDGE,
    "evaluation": BELOW_EDGE | EDGE,
    "viewer": BELOW_EDGE | EDGE,
    "trainer": BELOW_EDGE | EDGE,
    "cli": BELOW_EDGE | EDGE | {"trainer"},
}
CLIENTS = ("verl.retrieval.client", "generator_llms.client")
"""Workers get `search`, `answer` and `judge` as callables; they never construct these."""


@dataclass(frozen=True)
class Import:
    """One import statement: `unit` at `where` (file:line) loads `module`, which belongs to `target`."""

    unit: str
    target: str
    module: str
    where: str


def unit_of(module: str) -> str:
    """Name the layer unit of a dotted module name; empty for code that is not ours."""
    head, _, rest = module.partition(".")
    if head not in PACKAGES:
        return ""
    return rest.partition(".")[0] if head == "verl" else head


def imports_of(root: Path) -> Iterator[Import]:
    """Yield every import of our own code under `root`'s packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
            for node in ast.walk(tree):
                for target in _targets(node, module, path.name == "__init__.py"):
                    where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                    yield Import(unit_of(module), unit_of(target), target, where)


def _targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        anchor = parts[: len(parts) - node.level + is_package]
        base = ".".join(anchor + ([node.module] if node.module else []))
    return [f"{base}.{alias.name}" for alias in node.names]


def violations(root: Path) -> list[str]:
    """Describe every import under `root` that the table forbids."""
    found = []
    for item in imports_of(root):
        if not item.target or item.unit == item.target:
            continue
        if item.unit not in ALLOWED or item.target not in ALLOWED:
            found.append(f"{item.where}: {item.unit!r} imports {item.module}; enter both in the table of this test")
        elif item.target not in ALLOWED[item.unit]:
            found.append(f"{item.where}: {item.unit!r} may not import {item.module}")
        elif item.unit == "workers" and item.module.startswith(CLIENTS):
            found.append(f"{item.where}: workers get callables and may not import {item.module}")
    return found


def units_present(root: Path) -> set[str]:
    """Name all units that exist under `root`."""
    inside = {
        path.stem for path in (root / "verl").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return inside - {"__init__"} | {name for name in PACKAGES[1:] if (root / name).is_dir()}


def test_no_layer_imports_a_higher_one() -> None:
    assert violations(ROOT) == []


def test_every_unit_is_in_the_table() -> None:
    assert units_present(ROOT) <= set(ALLOWED)


def test_the_table_has_no_cycles_between_layers() -> None:
    peers = [COMPUTE, EDGE]
    for unit, targets in ALLOWED.items():
        for target in targets - {unit}:
            if any({unit, target} <= group for group in peers):
                continue
            assert unit not in ALLOWED[target], f"{unit} and {target} may import each other"


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("verl/algorithms/loss.py", "import verl.config", "may not import verl.config"),
        (
            "verl/agent/loop.py",
            "from verl.retrieval.client import Client",
            "may not import verl.retrieval.client.Client",
        ),
        ("verl/agent/loop.py", "from verl import trainer", "may not import verl.trainer"),
        ("verl/agent/loop.py", "from ..trainer import step", "may not import verl.trainer.step"),
        ("verl/agent/__init__.py", "from ..trainer import step", "may not import verl.trainer.step"),
        ("verl/types.py", "def f():\n    import verl.errors", "verl/types.py:2: 'types' may not import verl.errors"),
        ("verl/workers/rollout.py", "from verl.retrieval import client", "workers get callables"),
        ("verl/workers/rollout.py", "import generator_llms.client", "workers get callables"),
        ("verl/evaluation/score.py", "import verl.trainer.step", "may not import verl.trainer.step"),
        ("generator_llms/client.py", "import verl.records", "may not import verl.records"),
        ("verl/unheard.py", "import verl.types", "enter both in the table"),
    ],
)
def test_the_check_finds_a_forbidden_import(tmp_path: Path, unit: str, source: str, expected: str) -> None:
    path = tmp_path / unit
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("verl/agent/loop.py", "from .grammar import s3\nfrom verl.batch import Batch\nimport torch"),
        ("verl/trainer/step.py", "import verl.services\nfrom generator_llms.client import Client"),
        ("verl/workers/actor.py", "from verl.agent.protocols import Sampling\nimport verl.single_controller"),
    ],
)
def test_the_check_admits_allowed_imports(tmp_path: Path, unit: str, source: str) -> None:
    path = tmp_path / unit
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []
