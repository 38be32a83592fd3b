"""A DeepRetrieval episode as a whole: question, policy's words, PubMed's format, reward."""

from __future__ import annotations

import json

import pytest

from tests.agent.fakes import CharTokenizer, ScriptedEngine
from tests.retrieval.engines.literature_server import KEY, RATE_EXCEEDED, LiteratureServer
from tests.rewards.fakes import FakeGenerator
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.agent.loop import run
from verl.agent.protocols import Sampling
from verl.retrieval.engines.demo_records import records, search
from verl.retrieval.engines.demo_server import Reply
from verl.retrieval.engines.literature import LiteratureConfig, open_literature
from verl.retrieval.engines.service import ServiceConfig
from verl.rewards.evidence import Evidence
from verl.rewards.rank import RetrievalRecall
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Question, RewardOutcome, Stop, Trajectory

UNTIL = "2001/02/03"
TARGETS = search("asthma AND (aspirin OR metformin)", records(), UNTIL)
QUESTION = Question(
    "pubmed/test/0",
    "P: asthma\nI: aspirin\nC: metformin\nO:",
    tuple(record.pmid for record in TARGETS),
    "pubmed",
    extra={"pub_date": UNTIL},
)


async def play(server: LiteratureServer, said: str) -> tuple[Trajectory, RewardOutcome]:
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task="literature", topk=3000))
    http = ServiceConfig(rate=1000, attempts=2, backoff_s=0)
    config = LiteratureConfig(base_url=server.url, http=http)
    async with open_literature(config, {"NCBI_API_KEY": KEY}) as literature:
        trajectory = await run(QUESTION, grammar, ScriptedEngine(said), literature, CharTokenizer(), Sampling())
    if trajectory.stop is Stop.FAILED:
        return trajectory, await Scorer(RewardConfig({"valid_format": 1.0}), FakeGenerator())(trajectory)
    return trajectory, await RetrievalRecall()(Evidence(trajectory, trajectory.documents, FakeGenerator()))


def saying(query: object) -> str:
    return f"<think>hm</think><answer>{json.dumps({'query': query})}</answer>"


@pytest.mark.parametrize(
    ("said", "recall", "paid"),
    [
        (saying("asthma AND (aspirin OR metformin)"), 1.0, 6.0),
        (saying("asthma AND aspirin"), None, None),
        (saying("asthma & # \x00"), 1.0, 6.0),
        (saying("nowhere"), 0.0, -2.5),
        (saying(" "), 0.0, -4.0),
        ("<think>hm</think><answer></answer>", 0.0, -4.0),
        (saying(["asthma"]), 0.0, -4.0),
    ],
)
async def test_an_episode(server: LiteratureServer, said: str, recall: float | None, paid: float | None) -> None:
    trajectory, outcome = await play(server, said)
    assert len(TARGETS) >= 3
    if recall is None:  # the definition of recall, by hand
        recall = len(set(search("asthma AND aspirin", records(), UNTIL)) & set(TARGETS)) / len(TARGETS)
        assert 0 < recall < 1
    assert trajectory.stop is Stop.FINISHED and outcome.parts["recall"] == pytest.approx(recall)
    assert paid is None or outcome.score == paid
    assert all(asked.parameters["maxdate"] == UNTIL for asked in server.asked)


async def test_an_engine_that_is_down_fails_the_episode_as_data(server: LiteratureServer) -> None:
    server.always = Reply(RATE_EXCEEDED, 429)
    trajectory, outcome = await play(server, saying("asthma"))
    assert trajectory.stop is Stop.FAILED and "RetrieverError: pubmed: status 429" in trajectory.error
    assert "pubmed: status 429" in outcome.failed and KEY not in trajectory.error
