"""The quickstart end to end: real services, the packaged tiny models, a small world; and its second run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from verl.evaluation.collect import iter_contexts
from verl.records import read_questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ["naive_rag", "base_searcher", "base_searcher_sampled", "trained_searcher", "oracle"]
SIZES = ["world.train=24", "world.validation=8", "world.test=40"]
TRAINING = ["train.trainer.total_steps=2", "train.data.batch_size=4", "train.rollout.samples=4"]


def command(folder: Path) -> list[str]:
    # The hf engine starts in a moment; that both engines agree is shown elsewhere.
    return [
        *(sys.executable, "-m", "verl.trainer.quickstart", f"output={folder}"),
        *("train.engine.kind=hf", *SIZES, *TRAINING),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(command(folder), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_below(folder: Path) -> list[str]:
    """Command lines of running processes that mention `folder`: the services have their logs or files there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in line:
            found.append(line)
    return found


def test_a_killed_run_goes_on_and_a_second_one_reuses_everything(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    journal = folder / "questions" / "train.journal.jsonl"
    with subprocess.Popen(
        command(folder), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        # A line of parameters and the first answers.
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3, 300)
        first.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes_below(folder), 30)
    kept = journal.read_bytes().rpartition(b"\n")[0]

    finished = run(folder)
    assert journal.read_bytes().startswith(kept)
    assert not processes_below(folder)
    report = json.loads((folder / "report.json").read_text())
    assert list(report["methods"]) == METHODS
    assert report["seed"] == 0
    trained = report["training"]
    assert (trained["algorithm"], trained["steps"], trained["questions"], trained["trajectories"]) == ("grpo", 2, 8, 32)
    assert trained["seconds"] > 0
    assert (folder / "training" / "report.png").stat().st_size > 10_000
    assert all(name in finished.stdout for name in METHODS)
    check_figures(report["methods"])
    check_files(folder)

    again = run(folder)
    second = json.loads((folder / "report.json").read_text())
    assert second["methods"] == report["methods"]
    assert second["reused"] == [name for name in report["stages"] if name != "services"]
    assert "services" not in second["stages"]
    assert all(name in again.stdout for name in METHODS)


def check_figures(methods: dict) -> None:
    assert {figures["n"] for figures in methods.values()} == {40}
    assert {figures["failed"] for figures in methods.values()} == {0}
    assert (methods["naive_rag"]["searches"], methods["oracle"]["searches"]) == (1.0, 0.0)
    assert methods["oracle"]["recall"] == 1.0
    # What the packaged models promise on 400 questions, with room for chance on 40.
    assert methods["oracle"]["accuracy"] >= 0.8
    assert methods["naive_rag"]["accuracy"] <= 0.65
    assert methods["naive_rag"]["accuracy_by_kind"]["2-hop"] <= 0.2
    assert methods["base_searcher"]["valid"] >= 0.85


def check_files(folder: Path) -> None:
    for split, count in (("train", 24), ("validation", 8), ("test", 40)):
        questions = read_questions(folder / "questions" / f"{split}.parquet")
        assert len(questions) == count
        assert all(question.baseline and len(question.initial_documents) == 3 for question in questions)
    for method in METHODS:
        contexts = list(iter_contexts(folder / "contexts" / method))
        assert len({context.trajectory.question.id for context in contexts}) == 40
        published = json.loads((folder / "contexts" / method / "world_output_sequences.json").read_text())
        assert set(next(iter(published.values()))) == {"golden_answers", "context_with_info", "response_str"}
    cache = json.loads((folder / "questions" / "rag_cache.json").read_text())
    assert len(cache["world"]) == 72
    assert set(next(iter(cache["world"].values()))) == {"answer", "score", "em_score"}
