"""DeepRetrieval's scripts, run as a user runs them: a recipe trains, and every method ends in one report."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from data_preprocess.world import rewording
from data_preprocess.world.build import WorldFiles
from data_preprocess.world.rewording import RewordingConfig
from tests.integration.training_world import CHECKPOINTS, ROOT, environment, history
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.services import Service, free_ports, retriever_service, running

pytestmark = pytest.mark.integration

AGENT = CHECKPOINTS / "agent"
LIMIT = 24
LENGTHS = ["search.prompt=compact", "search.max_prompt_tokens=100", "search.max_context_tokens=200"]
LENGTHS += ["search.max_generation_tokens=48", "search.prefill=false"]
TINY = ["engine.kind=hf", "engine.dtype=float32", "engine.max_model_len=256"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorldFiles, Service]]:
    """The world in other words, and BM25 over it."""
    folder = tmp_path_factory.mktemp("world")
    files = rewording.build(RewordingConfig(train=40, validation=4, test=LIMIT), folder)
    build_index(Corpus.open(files.corpus), "bm25", folder / "bm25")
    (port,) = free_ports(1)
    service = retriever_service(folder / "bm25", files.corpus, "bm25", topk=10, port=port, log_path=folder / "log")
    with running(replace(service, grace=0.0)):
        yield files, service


def script(name: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_methods_are_collected_one_by_one_and_reported_together(
    served: tuple[WorldFiles, Service], tmp_path: Path
) -> None:
    files, service = served
    url = f"retriever.url={service.url}/retrieve"
    own = [f"questions={files.questions('test')}", f"limit={LIMIT}", url]
    scores = ["--", "filter=tokens", url]
    script("evaluation/deepretrieval.sh", "scifact", "raw_query", *own, *scores, FOLDER=str(tmp_path))
    printed = script(
        "evaluation/deepretrieval.sh",
        *("scifact", "deepretrieval", "engine.device=cpu", *TINY, *LENGTHS, *own, *scores, "against=raw_query"),
        FOLDER=str(tmp_path),
        MODEL=str(AGENT),
    )
    methods = json.loads((tmp_path / "report" / "report.json").read_text())["methods"]
    assert set(methods) == {"raw_query", "deepretrieval"} and all(name in printed for name in methods)
    assert {figures["n"] for figures in methods.values()} == {LIMIT}
    assert {figures["failed"] for figures in methods.values()} == {0}
    # The agent was taught the protocol, so most of its answers can be read.
    assert methods["deepretrieval"]["valid"] > 0.5
    assert methods["raw_query"]["scores"]["ndcg@10"] == pytest.approx(raw_ndcg(files, f"{service.url}/retrieve"))
    assert methods["raw_query"]["injection"]["injected"] == 0
    assert (tmp_path / "report" / "results" / "eval_results_deepretrieval.json").is_file()


def raw_ndcg(files: WorldFiles, url: str) -> float:
    """The same without script, collection or client."""
    asked = read_questions(files.questions("test"), LIMIT)
    body = json.dumps({"queries": [question.text for question in asked], "topk": 10}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
        found = json.loads(answer.read())["result"]
    ranks = [
        [hit["id"] for hit in hits].index(question.answers[0]) + 1
        for question, hits in zip(asked, found, strict=True)
        if question.answers[0] in [hit["id"] for hit in hits]
    ]
    # One relevant document each, so the ideal is 1.
    return sum(1 / math.log2(rank + 1) for rank in ranks) / len(asked)


def test_a_published_recipe_trains_with_tiny_parts(served: tuple[WorldFiles, Service], tmp_path: Path) -> None:
    files, service = served
    script(
        "train/train_deepretrieval.sh",
        *("nq", "3", "hardware=cpu", "model=tiny_agent", *TINY, *LENGTHS),
        f"data.train={files.questions('train')}",
        f"data.validation={files.questions('validation')}",
        f"retriever.url={service.url}/retrieve",
        f"trainer.folder={tmp_path}",
        *("data.batch_size=40", "actor.update.mini_batch_size=20", "critic.update.mini_batch_size=20"),
        *("trainer.epochs=1", "trainer.checkpoint.keep_steps=[]", "ray.object_store_gib=0.2"),
        # Its questions ask for ids, which no text holds.
        *("reward.terms={retrieval_recall: 1.0}", "~reward.terms.first_hit_rank", "~reward.params", "search.topk=10"),
    )
    (row,) = [row for row in history(tmp_path) if "reward/mean" in row]
    assert row["step"] == 1 and row["val/n"] == 4 and 0 <= row["reward/recall"] <= 1
    assert (tmp_path / "checkpoints" / "step_000001" / "hf" / "critic" / "config.json").is_file()
