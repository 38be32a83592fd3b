"""Training and collecting against a literature service: the demo server speaks PubMed and ClinicalTrials.gov."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from generator_llms.config import GeneratorConfig
from tests.agent.fakes import CharTokenizer, ScriptedEngine
from tests.retrieval.engines.literature_server import KEY, RATE_EXCEEDED, LiteratureServer
from tests.workers.tiny import tiny_tokenizer
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig
from verl.agent.grammar.registry import build_grammar
from verl.agent.protocols import Sampling, bound_to
from verl.evaluation.collect import CollectConfig, iter_contexts, run
from verl.evaluation.collectors import Searcher
from verl.records import write_questions
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.engines.choice import open_search, shared
from verl.retrieval.engines.demo_records import Record, records, search
from verl.retrieval.engines.demo_server import Reply
from verl.retrieval.engines.literature import LiteratureConfig, LiteratureSearch
from verl.retrieval.engines.service import ServiceConfig
from verl.rewards.registry import RewardConfig
from verl.trainer.metrics import rollout_metrics
from verl.trainer.surroundings import ServiceSurroundings
from verl.types import Question, Stop
from verl.workers.rollout import Sample, Surroundings, play

UNTIL = {"old": "1999/06/01", "new": "2010/06/01"}
QUERY = "asthma AND (aspirin OR metformin)"
HTTP = ServiceConfig(rate=1000, attempts=2, backoff_s=0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiteratureServer]:
    monkeypatch.setenv("NCBI_API_KEY", KEY)
    with LiteratureServer() as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def asked(name: str, engine: str = "pubmed") -> Question:
    """Return a question whose targets are what the right query finds up to its date."""
    until = UNTIL[name] if engine == "pubmed" else ""
    targets = tuple(identity(record, engine) for record in search(QUERY, records(), until))
    extra = {"pub_date": UNTIL[name]}
    return Question(f"{engine}/train/{name}", f"P: asthma ({name})\nI: aspirin\nC:\nO:", targets, engine, extra=extra)


def identity(record: Record, engine: str) -> str:
    return record.pmid if engine == "pubmed" else record.nct


def saying(query: object) -> str:
    return f"<think>hm</think><answer>{json.dumps({'query': query})}</answer>"


def literature(server: LiteratureServer, engine: str = "pubmed") -> LiteratureConfig:
    return LiteratureConfig(engine=engine, base_url=server.url, http=HTTP)  # type: ignore[arg-type]


def surroundings(tokenizer: str, config: LiteratureConfig) -> Surroundings:
    """Build what a rollout worker does, and read tokens as the scripted engine writes them."""
    made = ServiceSurroundings(
        tokenizer,
        DeepRetrievalConfig(task="literature", topk=3000),
        RetrieverClientConfig("http://127.0.0.1:9/retrieve"),
        GeneratorConfig(),
        RewardConfig({"retrieval_recall": 1.0}),
        judge=False,
        literature=config,
    )
    return replace(made(), tokenizer=CharTokenizer())


async def rollout(around: Surroundings, questions: Sequence[Question], *said: str) -> list[Sample]:
    try:
        return [
            await play(question, ScriptedEngine(text), around, Sampling())
            for question, text in zip(questions, said, strict=True)
        ]
    finally:
        await around.close()


@pytest.mark.parametrize("engine", ["pubmed", "ctgov"])
async def test_a_rollout_worker_searches_up_to_each_questions_date(
    server: LiteratureServer, tokenizer: str, engine: str
) -> None:
    questions = [asked("old", engine), asked("new", engine), asked("new", engine)]
    around = surroundings(tokenizer, literature(server, engine))
    samples = await rollout(around, questions, saying(QUERY), saying(QUERY), saying("nowhere"))
    found = [sample.trajectory.turns[0].result for sample in samples]
    assert [len(result.documents) for result in found if result] == [*(len(q.answers) for q in questions[:2]), 0]
    assert [sample.outcome.score for sample in samples] == [6.0, 6.0, -2.5]
    assert all(sample.search_seconds > 0 for sample in samples)
    assert (len(questions[0].answers) < len(questions[1].answers)) == (engine == "pubmed")
    if engine == "pubmed":
        wanted = {UNTIL["old"], UNTIL["new"]}
        assert {request.parameters["maxdate"] for request in server.asked} == wanted
    metrics = rollout_metrics(samples)
    assert metrics["reward/recall"] == pytest.approx(2 / 3)
    assert metrics["reward/70_recall_ratio"] == pytest.approx(2 / 3)
    assert metrics["reward/wrong_answer_ratio"] == pytest.approx(1 / 3)


HOSTILE = [
    "a & b",
    "x#y",
    '"unclosed',
    "' OR 1=1 --",
    "\x00\x07\n",
    "肺癌 سرطان 🫁",
    "a OR " * 25_000 + "a",
    "%26maxdate=2100",
]


@pytest.mark.parametrize("engine", ["pubmed", "ctgov"])
@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: ascii(query[:12]))
async def test_no_query_breaks_a_rollout(
    server: LiteratureServer, tokenizer: str, engine: str, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    question = asked("old", engine)
    around = surroundings(tokenizer, literature(server, engine))
    # The grammar's budget is in tokens, of which a long query needs one for each character here.
    around = replace(around, grammar=_Long(around.grammar))
    (sample,) = await rollout(around, [question], saying(query))
    too_long = engine == "ctgov" and len(query) > 16_000
    if too_long:  # the service takes no form, and its address is bounded: no score, and no other query is harmed
        assert "makes an address of" in sample.trajectory.error and sample.outcome.failed
    else:
        assert sample.trajectory.stop is Stop.FINISHED and not sample.outcome.failed
    for request in server.asked:
        if engine == "pubmed":
            assert request.parameters["maxdate"] == UNTIL["old"]
            assert set(request.parameters) <= {
                *("db", "term", "retmode", "retmax", "retstart", "datetype", "mindate", "maxdate"),
                *("tool", "api_key", "email"),
            }
        else:
            assert set(request.parameters) <= {"query.term", "pageSize", "fields", "countTotal", "pageToken"}
    assert KEY not in caplog.text and KEY not in sample.trajectory.error


class _Long:
    """A grammar with room for long turns."""

    def __init__(self, grammar: object) -> None:
        self._grammar = grammar
        limits = grammar.limits  # type: ignore[attr-defined]
        self.limits = replace(limits, generation_tokens=200_000, context_tokens=300_000)

    def __getattr__(self, name: str) -> object:
        return getattr(self._grammar, name)


async def test_an_engine_that_is_down_is_counted_and_trains_nobody(
    server: LiteratureServer, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.always = Reply(RATE_EXCEEDED, 429)
    around = surroundings(tokenizer, literature(server))
    samples = await rollout(around, [asked("old")], saying(QUERY))
    assert samples[0].trajectory.stop is Stop.FAILED and "pubmed: status 429" in samples[0].outcome.failed
    assert rollout_metrics(samples) == {"env/failed": 1.0, "env/trajectories": 1.0}
    assert KEY not in caplog.text and KEY not in samples[0].outcome.failed


async def test_one_search_is_chosen_and_workers_share_what_the_service_allows(server: LiteratureServer) -> None:
    retriever = RetrieverClientConfig("http://127.0.0.1:9/retrieve")
    config = replace(literature(server), http=ServiceConfig(rate=8, sharers=2))
    assert shared(config, 4).http == ServiceConfig(rate=8, sharers=8)
    async with open_search(retriever, config, processes=4) as opened:
        assert isinstance(opened, LiteratureSearch)
    async with open_search(retriever, None, processes=4) as opened:
        assert isinstance(opened, RetrieverClient)


async def test_naive_rag_and_searchers_collect_from_it(server: LiteratureServer, tmp_path: Path) -> None:
    raw = [replace(asked(name), extra={**asked(name).extra, "query": QUERY}) for name in UNTIL]
    write_questions(tmp_path / "q.parquet", raw, "test")
    config = CollectConfig(tmp_path / "q.parquet", tmp_path / "out", topk=3000, literature=literature(server))
    await run(config)
    for context, question in zip(iter_contexts(tmp_path / "out"), raw, strict=True):
        assert {document.id for document in context.trajectory.documents} == set(question.answers)
    assert "pubmed" in (tmp_path / "out/contexts.jsonl").read_text().splitlines()[0]
    async with open_search(config.retriever, config.literature) as opened:
        grammar = build_grammar(DeepRetrievalConfig(task="literature", topk=3000))
        for question in raw:
            gathered = await Searcher(
                grammar, ScriptedEngine(saying(QUERY)), opened, CharTokenizer(), Sampling(), initial_k=3000
            )(question)
            assert {d.id for d in gathered.trajectory.question.initial_documents} == set(question.answers)
            assert {d.id for d in gathered.trajectory.documents} == set(question.answers)


def test_most_searches_are_the_same_for_all() -> None:
    client = RetrieverClient(RetrieverClientConfig("http://127.0.0.1:9/retrieve"))
    assert bound_to(client, asked("old")) is client
