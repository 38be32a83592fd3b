"""Every script of the evaluation, run as a user runs it, over real services on the embedded world."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.generator_server import MODEL
from tests.integration.training_world import CHECKPOINTS, ROOT, SEARCHER, TrainingWorld, environment
from verl.evaluation.collect import Context, iter_contexts
from verl.records import read_questions
from verl.services import HOST, Service, free_port

pytestmark = pytest.mark.integration

LIMIT = 6
AGENTS = ("search_r1", "search_o1", "ircot", "deepretrieval")


def script(world: TrainingWorld, name: str, *arguments: str, **variables: str) -> str:
    """Run a script from the repository's root and return what it printed."""
    variables = {"QUESTIONS": str(world.files.questions("train")), **variables}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(world: TrainingWorld) -> list[str]:
    """What every collecting script is told besides."""
    return [f"retriever.url={world.retriever.url}/retrieve", f"limit={LIMIT}"]


def contexts(world: TrainingWorld, folder: Path) -> list[Context]:
    """What was collected, which is every question."""
    found = list(iter_contexts(folder))
    questions = read_questions(world.files.questions("train"), LIMIT)
    assert {context.trajectory.question.id for context in found} == {question.id for question in questions}
    assert (folder / "world_output_sequences.json").is_file() and not (folder / "errors.jsonl").exists()
    return found


@pytest.fixture(scope="module")
def collected(prepared: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all methods' contexts."""
    prepared.mend()
    folder = tmp_path_factory.mktemp("contexts")
    tiny = ["setting=world_agent", "engine.kind=hf", "engine.device=cpu", *asked(prepared)]
    for name in AGENTS:
        script(
            prepared, f"baselines/{name}.sh", "3", *tiny, OUTPUT=str(folder / name), MODEL=str(CHECKPOINTS / "agent")
        )
    s3 = ["setting=world", "engine.kind=hf", "engine.device=cpu", "search.max_turns=3", *asked(prepared)]
    script(prepared, "s3_inference/evaluate-3-3-3.sh", *s3, OUTPUT=str(folder / "s3"), MODEL=str(SEARCHER))
    script(prepared, "baselines/rag.sh", "topk=3", *asked(prepared), OUTPUT=str(folder / "rag"))
    for name, method in (("zeroshot", "zero_shot"), ("cot", "cot")):
        script(prepared, f"baselines/{name}.sh", f"limit={LIMIT}", OUTPUT=str(folder / method))
    return folder


def generator(world: TrainingWorld) -> list[str]:
    """What every scoring script is told of the generator."""
    return [
        f"generator.base_url={world.generator.url}/v1",
        f"generator.model={MODEL}",
        f"generator.tokenizer={CHECKPOINTS / 'generator'}",
        "generator.max_tokens=48",
        "generator.max_prompt_tokens=900",
    ]


def test_agents_search_in_their_protocols(prepared: TrainingWorld, collected: Path) -> None:
    found = {name: contexts(prepared, collected / name) for name in AGENTS}
    for name, gathered in found.items():
        # IRCoT starts from a search for the question, which is all that a 1-hop question needs.
        needed = 1 if name == "ircot" else LIMIT - 1
        assert sum(context.trajectory.searches > 0 for context in gathered) >= needed, name
        assert all(context.tokens > 0 for context in gathered), name
    assert all(context.trajectory.searches <= 1 for context in found["deepretrieval"])
    assert any(context.trajectory.answer for context in found["search_r1"])
    assert all(context.trajectory.question.initial_documents for context in found["ircot"])


def test_naive_rag_s3_and_the_methods_without_documents(prepared: TrainingWorld, collected: Path) -> None:
    assert all(len(context.trajectory.documents) == 3 for context in contexts(prepared, collected / "rag"))
    assert all(context.trajectory.valid for context in contexts(prepared, collected / "s3"))
    for name in ("zero_shot", "cot"):
        assert not any(context.trajectory.documents for context in contexts(prepared, collected / name))


def test_one_report_compares_them_all(prepared: TrainingWorld, collected: Path, tmp_path: Path) -> None:
    out = {"CONTEXTS": str(collected), "OUTPUT": str(tmp_path)}
    printed = script(prepared, "evaluation/run.sh", "against=rag", *generator(prepared), **out)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["methods"]) == {*AGENTS, "s3", "rag", "zero_shot", "cot"}
    assert all(name in printed for name in report["methods"])
    assert all(figures["n"] == LIMIT for figures in report["methods"].values())
    assert report["methods"]["search_r1"]["against_baseline"]["n"] == LIMIT
    assert set(json.loads((tmp_path / "results" / "rag_stats.json").read_text())) == {"world"}
    ablation = script(
        prepared,
        "evaluation/run_ablation.sh",
        f"contexts.s3={collected / 's3'}",
        *generator(prepared),
        **out | {"OUTPUT": str(tmp_path / "a")},
    )
    assert all(f"s3_{name}" in ablation for name in ("no_selection", "no_round_0", "neither"))


def test_the_bm25_launcher_serves_and_precompute_fills_the_cache(prepared: TrainingWorld, tmp_path: Path) -> None:
    files = prepared.files
    port = free_port()
    launcher = Service(
        "launcher",
        ["bash", str(ROOT / "scripts" / "deploy_retriever" / "retrieval_launch_bm25.sh")],
        f"http://{HOST}:{port}/health",
        tmp_path / "launcher.log",
        env=environment() | {"INDEX_PATH": str(files.index), "CORPUS_PATH": str(files.world.corpus), "PORT": str(port)},
    )
    asked = [f"questions={files.world.questions('train')}", f"output={tmp_path / 'train.parquet'}", "split=train"]
    asked += [f"limit={LIMIT}", "filter.drop_rag_correct=false", *generator(prepared)]
    with launcher:
        script(prepared, "precompute.sh", *asked, f"retriever.url={launcher.url}/retrieve")
    written = read_questions(tmp_path / "train.parquet")
    assert len(written) == LIMIT and all(len(question.initial_documents) == 3 for question in written)
    assert all(question.baseline is not None for question in written)
    cache = json.loads((tmp_path / "rag_cache.json").read_text())
    assert set(cache["world"]) == {question.text for question in written}
    assert {key for entry in cache["world"].values() for key in entry} == {"answer", "score", "em_score"}
