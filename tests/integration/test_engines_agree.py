"""vLLM and the hf engine play the same greedy trajectories over the embedded world, before and after new weights."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from data_preprocess.world import language
from data_preprocess.world.language import World, names
from tests.workers.tiny import teach
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.loop import gather
from verl.agent.protocols import Sampling
from verl.errors import EngineError, WorkerError
from verl.types import Document, Question, Role, SearchResult, Stop, Trajectory
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine
from verl.workers.sampler import RowSampling, processed_logprobs

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

SEARCHER = Path(language.__file__).parent / "checkpoints" / "searcher"
QUESTIONS = 50
WORLD = World.generate(seed=5, entities=names(60))
GRAMMAR = S3Grammar(
    S3Config(
        topk=2,
        max_turns=2,
        max_generation_tokens=60,
        max_observation_tokens=200,
        max_prompt_tokens=400,
        max_context_tokens=1000,
        prompt="compact",
    )
)
GREEDY = Sampling(temperature=0.0)


class WordSearch:
    """Ranks the world's passages by how many of the query's words they hold."""

    def __init__(self, passages: Sequence[Document]) -> None:
        self.passages = passages

    def rank(self, query: str, topk: int) -> SearchResult:
        """Return the `topk` best passages, the earlier one first among equals."""
        words = _words(query)
        scored = [(float(len(words & _words(passage.contents))), -i) for i, passage in enumerate(self.passages)]
        best = sorted(scored, reverse=True)[:topk]
        return SearchResult(query, tuple(self.passages[-i] for _, i in best), tuple(score for score, _ in best))

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Rank for every query."""
        return [self.rank(query, topk) for query in queries]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


SEARCH = WordSearch(WORLD.passages())


def questions(count: int = QUESTIONS) -> list[Question]:
    """World questions with two round-0 documents each."""
    drawn = WORLD.questions("world", "test", count, seed=1)
    return [
        Question(q.id, q.text, q.answers, q.source, initial_documents=SEARCH.rank(q.text, 2).documents) for q in drawn
    ]


@dataclass(frozen=True)
class Pair:
    """Both engines over the same checkpoint, and that checkpoint's model."""

    hf: RolloutEngine
    vllm: RolloutEngine
    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast


def taught(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The packaged searcher, overfitted to a few ways of playing: search and select, stop at once, say nothing."""
    said = [
        ['<query>{"query": "mentor of NAME"}</query>', "<important_info>[1]</important_info>\n", "DONE"],
        ["<search_complete>False</search_complete>", '\n<query>{"query": "rival of NAME"}</query>', "DONE"],
        ["DONE"],
        ["I do not know.<|im_end|>"],
    ]
    lessons = []
    for number, asked in enumerate(questions(12)):
        name = asked.text.rstrip("?").split()[-1]
        ids = tokenizer.apply_chat_template(
            GRAMMAR.prompt_messages(asked), add_generation_prompt=True, return_dict=False
        )
        learned = [False] * len(ids)
        for text in said[number % len(said)]:
            text = text.replace("NAME", name).replace("DONE", "<search_complete>True</search_complete>")
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids, learned = ids + piece, learned + [True] * len(piece)
            if text.endswith("</query>"):
                block = tokenizer.encode(GRAMMAR.observation_text(SEARCH.rank(text, 2).documents))
                ids, learned = ids + block, learned + [False] * len(block)
        lessons.append((ids, learned))
    model = AutoModelForCausalLM.from_pretrained(SEARCHER, dtype=torch.float32)
    teach(model, lessons, steps=40)
    return model


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Pair]:
    tokenizer = AutoTokenizer.from_pretrained(SEARCHER)
    model = taught(tokenizer)
    config = {"model": str(SEARCHER), "dtype": "float32", "max_model_len": 1024}
    vllm = create_engine(EngineConfig(kind="vllm", **config))
    yield Pair(create_engine(EngineConfig(kind="hf", **config)), vllm, model, tokenizer)
    await vllm.close()  # closing twice is allowed


async def play(engine: RolloutEngine, tokenizer: PreTrainedTokenizerFast) -> list[Trajectory]:
    """Play all questions greedily, in the order of the questions."""
    played = {t.question.id: t async for t in gather(questions(), GRAMMAR, engine, SEARCH, tokenizer, GREEDY, 32)}
    return [played[question.id] for question in questions()]


def assert_agree(ours: Sequence[Trajectory], theirs: Sequence[Trajectory]) -> None:
    """Same prompts, ids, turns, documents and ends; log-probabilities within 1e-3."""
    assert len(ours) == len(theirs) == QUESTIONS
    for one, other in zip(ours, theirs, strict=True):
        assert [s.ids for s in one.segments] == [s.ids for s in other.segments]
        assert (one.prompt_ids, one.stop, one.documents) == (other.prompt_ids, other.stop, other.documents)
        assert [(t.text, t.query, t.result) for t in one.turns] == [(t.text, t.query, t.result) for t in other.turns]
        for a, b in zip(one.segments, other.segments, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
            assert a.weight_version == b.weight_version


async def test_the_packaged_searcher_plays_alike(pair: Pair) -> None:
    ours, theirs = await play(pair.hf, pair.tokenizer), await play(pair.vllm, pair.tokenizer)
    assert_agree(ours, theirs)
    assert all(t.stop is Stop.FINISHED for t in ours)


async def test_greedy_trajectories_agree(pair: Pair) -> None:
    await pair.hf.update_weights(pair.model.named_parameters(), 1)
    await pair.vllm.update_weights(pair.model.named_parameters(), 1)
    ours, theirs = await play(pair.hf, pair.tokenizer), await play(pair.vllm, pair.tokenizer)
    assert_agree(ours, theirs)
    assert {t.stop for t in ours} <= {Stop.FINISHED, Stop.TURN_LIMIT, Stop.LENGTH}
    assert any(t.searches for t in ours) and any(turn.invalid for t in ours for turn in t.turns)


async def test_they_agree_after_new_weights(pair: Pair) -> None:
    torch.manual_seed(3)
    new = {name: p.detach() + 0.02 * torch.randn_like(p) for name, p in pair.model.named_parameters()}
    await pair.vllm.update_weights(pair.model.named_parameters(), 1)
    before = await play(pair.vllm, pair.tokenizer)
    await pair.hf.update_weights(new.items(), 2)
    await pair.vllm.update_weights(new.items(), 2)
    ours, theirs = await play(pair.hf, pair.tokenizer), await play(pair.vllm, pair.tokenizer)
    assert_agree(ours, theirs)
    assert {s.weight_version for t in theirs for s in t.segments if s.role is Role.POLICY} == {2}
    assert [t.segments[0].logprobs for t in before] != [t.segments[0].logprobs for t in theirs]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, max_tokens=40, seed=1),
        Sampling(temperature=0.6, top_p=0.95, max_tokens=40, seed=2),
        Sampling(temperature=1.3, top_k=5, max_tokens=40, seed=3),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "vllm"])
async def test_logprobs_are_those_of_the_distribution_drawn_from(pair: Pair, kind: str, sampling: Sampling) -> None:
    engine: RolloutEngine = getattr(pair, kind)
    await engine.update_weights(pair.model.named_parameters(), 3)
    prompt = pair.tokenizer.encode("Who is the mentor of Ada?")
    answer = await engine.generate(prompt, sampling)
    with torch.no_grad():
        logits = pair.model(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    count = len(answer.ids)
    rows = RowSampling.of([sampling] * count, [0] * count, torch.device("cpu"))
    expected = processed_logprobs(logits, rows).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


async def test_what_vllm_cannot_serve_is_an_engine_error(pair: Pair) -> None:
    with pytest.raises(EngineError, match="leaves no room"):
        await pair.vllm.generate([1] * 1024, GREEDY)
    with pytest.raises(EngineError, match="vLLM could not generate"):
        await pair.vllm.generate([10**6], GREEDY)
    with pytest.raises(EngineError, match="1 parameters did not come"):
        await pair.vllm.update_weights(list(pair.model.named_parameters())[1:], 9)
    assert pair.vllm.weight_version != 9
    assert len((await pair.vllm.generate([1, 2, 3], Sampling(max_tokens=4))).ids) > 0


async def test_a_vllm_that_is_killed_is_a_dead_worker_and_no_failed_generation(pair: Pair) -> None:
    (core,) = [process for process in multiprocessing.active_children() if "EngineCore" in process.name]
    core.kill()
    with pytest.raises(WorkerError, match=r"engine process .* died"):
        await pair.vllm.generate([1, 2, 3], Sampling(max_tokens=4))


async def test_a_closed_vllm_engine_says_so(pair: Pair) -> None:
    await pair.vllm.close()
    with pytest.raises(EngineError, match="closed"):
        await pair.vllm.generate([1], GREEDY)
    with pytest.raises(EngineError, match="closed"):
        await pair.vllm.update_weights([], 1)
    await pair.vllm.close()
