"""The gate that the tiny models must pass, measured with the real loop, prompts and BM25 on held-out questions."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_preprocess.world.build import WorldConfig, build
from generator_llms import prompts
from verl.agent import loop
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig
from verl.agent.grammar.ircot import IRCoTConfig
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.agent.grammar.s3 import S3Config
from verl.agent.grammar.search_o1 import SearchO1Config
from verl.agent.grammar.search_r1 import SearchR1Config
from verl.agent.protocols import Sampling
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine, open_index
from verl.rewards.text import span_match
from verl.types import Document, Question, SearchResult, Trajectory
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

SEARCH = S3Config(
    topk=3,
    max_selected=3,
    max_turns=3,
    max_generation_tokens=64,
    max_observation_tokens=200,
    max_prompt_tokens=400,
    max_context_tokens=1000,
    prompt="compact",
)
_LENGTHS = {"max_generation_tokens": 96, "max_observation_tokens": 200, "max_context_tokens": 1000}
AGENT: dict[str, SearchConfig] = {
    "Search-R1": SearchR1Config(max_prompt_tokens=400, prompt="compact", **_LENGTHS),
    "Search-o1": SearchO1Config(max_prompt_tokens=400, prompt="compact", condense=False, **_LENGTHS),
    "IRCoT": IRCoTConfig(max_prompt_tokens=900, prompt="compact", **_LENGTHS),
    "DeepRetrieval": DeepRetrievalConfig(topk=3, max_prompt_tokens=400, prompt="compact", **_LENGTHS),
}
"""The baselines' protocols at the lengths that the tiny agent can take."""

BASELINE_DOCUMENTS = 3
Context = Sequence[Document]


@dataclass(frozen=True)
class Check:
    """One line of the gate: a measured share and the range it must lie in."""

    name: str
    value: float
    low: float = 0.0
    high: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the value lies in its range."""
        return self.low <= self.value <= self.high

    def line(self) -> str:
        """Render for the console."""
        word = "pass" if self.passed else "FAIL"
        return f"{word}  {self.name:<48} {self.value:.3f}  in [{self.low:.2f}, {self.high:.2f}]"


class HeldOut:
    """The held-out questions with their corpus, BM25 engine and round-0 documents."""

    def __init__(self, folder: Path, config: WorldConfig) -> None:
        files = build(config, folder)
        corpus = Corpus.open(files.corpus)
        build_index(corpus, "bm25", folder / "bm25")
        self.engine: Engine = open_index(folder / "bm25", corpus, "bm25")
        self.by_title = {document.title: document for document in corpus.documents()}
        bare = read_questions(files.questions("test"))
        found = self.engine.search([question.text for question in bare], 9)
        self.retrieved = {q.id: result.documents for q, result in zip(bare, found, strict=True)}
        self.questions = [replace(q, initial_documents=self.retrieved[q.id][:BASELINE_DOCUMENTS]) for q in bare]

    async def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Search in this process."""
        return self.engine.search(queries, topk)

    def gold(self, question: Question) -> list[Document]:
        """The passages that hold the answer, in hop order."""
        return [self.by_title[title] for title in question.gold_titles]

    def distracted(self, question: Question, rng: random.Random) -> list[Document]:
        """Gold passages among 3 to 6 others that BM25 ranks highest, shuffled."""
        gold = self.gold(question)
        others = [d for d in self.retrieved[question.id] if d not in gold][: rng.randint(3, 6)]
        mixed = gold + others
        rng.shuffle(mixed)
        return mixed


class Reader:
    """The generator, greedy, asked as the service would be."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._engine = tiny_engine(model)

    async def accurate(self, questions: Sequence[Question], contexts: Sequence[Context]) -> list[bool]:
        """Say for each question whether the answer from its context is accurate."""
        return list(await asyncio.gather(*(self._one(q, c) for q, c in zip(questions, contexts, strict=True))))

    async def _one(self, question: Question, context: Context) -> bool:
        messages = prompts.build("context", question, context)
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        generation = await self._engine.generate(tuple(ids), Sampling(temperature=0.0, max_tokens=48))
        return span_match(prompts.final_answer(generation.text), question.answers)


def tiny_engine(model: Path) -> RolloutEngine:
    """Load a tiny model in float32."""
    return create_engine(EngineConfig(str(model), kind="hf", dtype="float32", max_model_len=1024, device="cpu"))


async def trajectories(
    model: Path, held_out: HeldOut, sampling: Sampling, search: SearchConfig = SEARCH
) -> list[Trajectory]:
    """Search for every held-out question; result i belongs to question i."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    grammar = build_grammar(search)
    engine = tiny_engine(model)
    done = {}
    async for trajectory in loop.gather(held_out.questions, grammar, engine, held_out.search, tokenizer, sampling):
        done[trajectory.question.id] = trajectory
    return [done[question.id] for question in held_out.questions]


async def generator_checks(reader: Reader, held_out: HeldOut) -> list[Check]:
    """Measure the generator on gold passages, among distractors, and on naive RAG."""
    rng = random.Random(0)
    asked = held_out.questions
    gold = await reader.accurate(asked, [held_out.gold(q) for q in asked])
    distracted = await reader.accurate(asked, [held_out.distracted(q, rng) for q in asked])
    naive = await reader.accurate(asked, [q.initial_documents for q in asked])
    return [
        Check("generator, gold passages", share(gold), low=0.90),
        Check("generator, gold + 3-6 distractors", share(distracted), low=0.80),
        Check("naive RAG, all", share(naive), high=0.60),
        Check("naive RAG, 2-hop", share(of_kind(asked, naive, "2-hop")), high=0.10),
    ]


async def searcher_checks(reader: Reader, searcher: Path, held_out: HeldOut, oracle: float, seed: int) -> list[Check]:
    """Measure the base searcher, sampled and greedy."""
    asked = held_out.questions
    sampled = await trajectories(searcher, held_out, Sampling(temperature=1.0, seed=seed))
    greedy = await trajectories(searcher, held_out, Sampling(temperature=0.0))
    sampled_right = await reader.accurate(asked, [t.documents for t in sampled])
    greedy_right = await reader.accurate(asked, [t.documents for t in greedy])
    return [
        Check("base searcher, valid (sampled)", share([t.valid for t in sampled]), low=0.95),
        Check("base searcher, sampled, 2-hop success", share(of_kind(asked, sampled_right, "2-hop")), 0.10, 0.30),
        Check("base searcher, sampled, all", share(sampled_right)),
        Check("base searcher, greedy, 2-hop", share(of_kind(asked, greedy_right, "2-hop"))),
        Check("base searcher, greedy, all: 0.20 below oracle", share(greedy_right), high=oracle - 0.20),
    ]


async def agent_checks(reader: Reader, agent: Path, held_out: HeldOut) -> list[Check]:
    """Measure the agent, greedy, in every protocol of the baselines: is it valid, and does it help the generator."""
    checks = []
    for name, search in AGENT.items():
        played = await trajectories(agent, held_out, Sampling(temperature=0.0), search)
        right = await reader.accurate(held_out.questions, [t.documents for t in played])
        checks.append(Check(f"agent, {name}, valid", share([t.valid for t in played]), low=0.90))
        checks.append(Check(f"agent, {name}, generator accurate", share(right), low=0.30))
    return checks


def of_kind(questions: Sequence[Question], values: Sequence[bool], kind: str) -> list[bool]:
    """The values of the questions of one kind."""
    return [value for question, value in zip(questions, values, strict=True) if question.kind == kind]


def share(values: Sequence[bool]) -> float:
    """The share that is true."""
    return sum(values) / len(values)


async def measure(
    generator: Path, searcher: Path | None = None, agent: Path | None = None, test: int = 400, seed: int = 0
) -> list[Check]:
    """Run the gate on `test` held-out questions, for the models that are given."""
    with tempfile.TemporaryDirectory() as folder:
        held_out = HeldOut(Path(folder), WorldConfig(test=test, seed=seed))
        reader = Reader(generator)
        checks = await generator_checks(reader, held_out)
        if searcher is not None:
            checks += await searcher_checks(reader, searcher, held_out, checks[0].value, seed)
        if agent is not None:
            checks += await agent_checks(reader, agent, held_out)
        return checks
