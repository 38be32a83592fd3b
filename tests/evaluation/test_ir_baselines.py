"""Raw-query baselines on real collections: our BM25, rewards and metrics against computations that share no code."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import pytrec_eval

from data_preprocess import ir, scifact
from tests.rewards.fakes import FakeGenerator
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index
from verl.retrieval.settings import BM25Config
from verl.rewards.evidence import Evidence
from verl.rewards.ndcg import Ndcg
from verl.rewards.rank import FirstHitRank, RetrievalRecall
from verl.types import Question, RewardOutcome, SearchResult, Stop, Trajectory, Turn

DATA = Path(__file__).resolve().parents[3] / "shared/data"
SCIFACT = DATA / "scifact/scifact.zip"
SQUAD = DATA / "squad/squad_v1.1_dev_partA.json"
NQ = DATA / "nq_open_oracle/nq-open-oracle.jsonl.gz"


def rewarded(reward: object, question: Question, result: SearchResult) -> RewardOutcome:
    turn = Turn((), "", question.text, finished=True, result=result)
    trajectory = Trajectory(question, (), (turn,), Stop.FINISHED, result.documents)
    return asyncio.run(reward(Evidence(trajectory, result.documents, FakeGenerator())))  # type: ignore[operator]


@pytest.mark.skipif(not SCIFACT.is_file(), reason="../shared/data/scifact is not there")
def test_scifact(tmp_path: Path) -> None:
    """With the published parameters of SciFact (k1 1.2, b 0.75); the claims are the queries."""
    scifact.convert(SCIFACT, tmp_path / "beir")
    questions = ir.convert(ir.IrSet("scifact"), tmp_path / "beir", tmp_path / "questions").splits["test"]
    corpus = Corpus.open(tmp_path / "beir")
    build_index(corpus, "bm25", tmp_path / "index", BuildOptions(bm25=BM25Config(k1=1.2, b=0.75)))
    engine = open_index(tmp_path / "index", corpus, "bm25")
    results = engine.search([question.text for question in questions], 100)
    qrels = _qrels(tmp_path / "beir/qrels/test.tsv")
    assert {question.extra["qid"] for question in questions} == set(qrels)

    run = {
        question.extra["qid"]: {document.id: -float(rank) for rank, document in enumerate(result.documents)}
        for question, result in zip(questions, results, strict=True)
    }
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    found: dict[str, list[float]] = {"ndcg": [], "recall": []}
    for question, result in zip(questions, results, strict=True):
        truth = expected[question.extra["qid"]]
        order, recall = rewarded(Ndcg(), question, result), rewarded(RetrievalRecall(topk=100), question, result)
        assert order.parts["ndcg"] == pytest.approx(truth["ndcg_cut_10"], abs=1e-9)
        assert order.score == pytest.approx(0.1 + truth["ndcg_cut_10"] if truth["ndcg_cut_10"] else 0.0)
        assert recall.parts["recall"] == pytest.approx(truth["recall_100"], abs=1e-9)
        found["ndcg"].append(order.parts["ndcg"])
        found["recall"].append(recall.parts["recall"])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert means["ndcg"] == pytest.approx(0.67, abs=0.02), "BM25's published figure"
    assert 0.85 < means["recall"] < 1


def _qrels(path: Path) -> Mapping[str, Mapping[str, int]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in rows:
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels


def _naive_rank(texts: Sequence[str], answers: Sequence[str]) -> int | None:
    """Find the first passage that holds an answer's words in a row, word by word, for plain ASCII texts."""

    def words(text: str) -> list[str]:
        spaced = "".join(c if c.isalnum() and c.isascii() else f" {c} " for c in text.lower())
        return spaced.split()

    for rank, text in enumerate(texts, start=1):
        passage = words(text)
        for answer in map(words, answers):
            if any(passage[at : at + len(answer)] == answer for at in range(len(passage) - len(answer) + 1)):
                return rank
    return None


def _tier(rank: int | None) -> float:
    tiers = ((5, 6.0), (20, 5.0), (50, 3.0), (100, 2.0))
    return next((paid for bound, paid in tiers if rank is not None and rank <= bound), -2.5)


@pytest.mark.skipif(not (SQUAD.is_file() and NQ.is_file()), reason="../shared/data has no squad or nq_open_oracle")
def test_pooled_evidence_questions(tmp_path: Path) -> None:
    """Some of SQuAD's and NQ's questions over the passages of both; only ASCII is read naively."""
    passages, asked = _pooled()
    lines = (json.dumps({"id": str(n), "contents": f'"{title}"\n{text}'}) for n, (title, text) in enumerate(passages))
    (tmp_path / "corpus.jsonl").write_text("".join(f"{line}\n" for line in lines))
    corpus = Corpus.open(tmp_path / "corpus.jsonl")
    build_index(corpus, "bm25", tmp_path / "index")
    engine = open_index(tmp_path / "index", corpus, "bm25")
    hits = []
    for question, result in zip(asked, engine.search([question.text for question in asked], 100), strict=True):
        outcome = rewarded(FirstHitRank(topk=100), question, result)
        rank = _naive_rank([document.text for document in result.documents], question.answers)
        assert (outcome.score, outcome.parts.get("rank")) == (_tier(rank), rank), question.id
        hits.append(outcome.parts["hit@5"])
    assert len(hits) > 200
    assert 0.8 < sum(hits) / len(hits) < 1, "the figures given for the collections alone are 0.92 and 0.91"


def _pooled() -> tuple[list[tuple[str, str]], list[Question]]:
    """Return all gold passages of both files that are plain ASCII, and every so many of their questions."""
    passages: dict[tuple[str, str], None] = {}
    squad: list[Question] = []
    nq: list[Question] = []
    for article in json.loads(SQUAD.read_text())["data"]:
        for paragraph in filter(lambda found: found["context"].isascii(), article["paragraphs"]):
            passages[article["title"], paragraph["context"]] = None
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                squad.append(Question(f"squad/test/{qa['id']}", qa["question"], answers, "squad"))
    for number, line in enumerate(gzip.decompress(NQ.read_bytes()).decode().splitlines()):
        row = json.loads(line)
        gold = row["ctxs"][0]
        if gold["text"].isascii() and "".join(row["answers"]).isascii():
            passages[gold["title"], gold["text"]] = None
            nq.append(Question(f"nq/test/{number}", row["question"], tuple(row["answers"]), "nq"))
    return list(passages), [*squad[::30], *nq[::15]]
