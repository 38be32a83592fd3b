"""The agent loop, played by a scripted engine against a dictionary of search results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.fakes import (
    ENGINE_DOWN,
    EOS,
    RETRIEVER_DOWN,
    CharTokenizer,
    DictSearch,
    ScriptedEngine,
    docs,
    question,
)
from tests.agent.test_s3 import POLICY_TEXT
from verl.agent.collate import collate
from verl.agent.grammar.base import Action, Limits, Observation
from verl.agent.grammar.s3 import FEEDBACK, S3Config, S3Grammar
from verl.agent.loop import derive_seed, gather, run, user_turn
from verl.agent.protocols import Generation, Sampling
from verl.errors import GrammarError
from verl.types import Document, Question, Role, SearchResult, Stop, Trajectory, Turn

CONFIG = S3Config(
    topk=3,
    max_turns=2,
    max_generation_tokens=120,
    max_observation_tokens=400,
    max_prompt_tokens=1000,
    max_context_tokens=3000,
    prompt="compact",
)
DONE = "<search_complete>True</search_complete>"
CONTINUE = "<search_complete>False</search_complete>"
GREEDY = Sampling(temperature=0.0)
SEARCH = {"a": docs("a1", "a2", "a3"), "b": docs("b1"), "none": (), "down": RETRIEVER_DOWN}


def query(text: str) -> str:
    """A well-formed query turn."""
    return f'<query>{{"query": "{text}"}}</query>'


def block(*names: str) -> str:
    """The observation that shows these documents."""
    return S3Grammar(CONFIG).observation_text(docs(*names))


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


async def play(
    *script: str | Exception, config: S3Config = CONFIG, asked: Question | None = None
) -> tuple[Trajectory, ScriptedEngine, DictSearch]:
    engine, search = ScriptedEngine(*script), DictSearch(SEARCH)
    asked = asked or question(docs("r1", "r2"))
    trajectory = await run(asked, S3Grammar(config), engine, search, CharTokenizer(), GREEDY)
    assert_tokens_in_tokens_out(trajectory, engine)
    return trajectory, engine, search


def assert_tokens_in_tokens_out(trajectory: Trajectory, engine: ScriptedEngine) -> None:
    """Every context the engine saw is the prompt and a run of whole segments, unchanged."""
    contexts = [text_of(trajectory.prompt_ids)]
    for segment in trajectory.segments:
        contexts.append(contexts[-1] + text_of(segment.ids))
        policy = segment.role is Role.POLICY
        assert len(segment.logprobs) == (len(segment.ids) if policy else 0)
        assert (segment.weight_version == -1) != policy
    assert [context for context in engine.contexts if context not in contexts] == []


async def test_completion_ends_the_search() -> None:
    trajectory, engine, search = await play(DONE)
    assert (trajectory.stop, trajectory.searches, len(trajectory.turns)) == (Stop.FINISHED, 0, 1)
    assert trajectory.documents == docs("r1", "r2")
    assert trajectory.turns[0].finished and trajectory.turns[0].text == DONE
    assert engine.contexts == [text_of(trajectory.prompt_ids)]
    assert search.calls == []


async def test_the_prompt_goes_through_the_chat_template() -> None:
    trajectory, _, _ = await play(DONE)
    prompt = text_of(trajectory.prompt_ids)
    assert prompt.startswith("<|im_start|>user\nSearch for the question, then stop.\n<question>\nWho?\n</question>")
    assert prompt.endswith(f"</information>{EOS}\n<|im_start|>assistant\n")


async def test_a_query_is_answered_and_its_block_selected_from() -> None:
    select = f"<important_info>[3, 1]</important_info>{DONE}"
    trajectory, engine, search = await play(query("a"), select)
    assert trajectory.stop is Stop.FINISHED
    assert search.calls == [(("a",), 3)]
    first, second = trajectory.turns
    assert first.query == "a" and first.result is not None and first.result.documents == SEARCH["a"]
    assert [s.role for s in first.segments] == [Role.POLICY, Role.ENVIRONMENT]
    assert text_of(first.segments[1].ids) == block("a1", "a2", "a3")
    assert (second.selected, second.finished) == ((3, 1), True)
    assert [d.id for d in trajectory.documents] == ["a1", "a3", "r1", "r2"]
    assert engine.contexts[1].endswith(query("a") + block("a1", "a2", "a3"))


async def test_the_selection_cap_is_enforced() -> None:
    config = replace(CONFIG, max_selected=1)
    trajectory, _, _ = await play(query("a"), f"<important_info>[3, 1, 2]</important_info>{DONE}", config=config)
    assert trajectory.turns[1].selected == (3,)
    assert [d.id for d in trajectory.documents] == ["a3", "r1", "r2"]


async def test_a_selection_with_the_first_query_binds_to_round_zero() -> None:
    trajectory, _, _ = await play(f"<important_info>[2]</important_info>{query('b')}", DONE)
    assert [d.id for d in trajectory.documents] == ["r2", "b1"]


async def test_false_completion_and_query_are_one_turn_of_two_segments() -> None:
    trajectory, engine, _ = await play(query("a"), CONTINUE, "\n" + query("b"), DONE)
    assert len(trajectory.turns) == 3
    turn = trajectory.turns[1]
    assert [s.role for s in turn.segments] == [Role.POLICY, Role.POLICY, Role.ENVIRONMENT]
    assert turn.text == f"{CONTINUE}\n{query('b')}"
    assert (turn.query, turn.invalid) == ("b", False)
    assert [s.weight_version for s in turn.segments] == [2, 3, -1]
    assert engine.samplings[2].max_tokens == CONFIG.max_generation_tokens - len(CONTINUE)


async def test_the_turn_budget_spans_segments() -> None:
    config = replace(CONFIG, max_generation_tokens=len(CONTINUE) * 2)
    trajectory, engine, _ = await play(CONTINUE, CONTINUE, DONE, config=config)
    assert [len(turn.segments) for turn in trajectory.turns] == [3, 1]
    assert trajectory.turns[0].invalid
    assert [s.max_tokens for s in engine.samplings] == [len(CONTINUE) * 2, len(CONTINUE), len(CONTINUE) * 2]


@pytest.mark.parametrize("said", [f"I do not know{EOS}", EOS, "x" * CONFIG.max_generation_tokens])
async def test_neither_gets_feedback_that_opens_a_query(said: str) -> None:
    trajectory, engine, search = await play(said, '{"query": "b"}\n</query>', DONE)
    first, second, _ = trajectory.turns
    assert (first.invalid, first.query, first.result) == (True, None, None)
    assert [text_of(s.ids) for s in first.segments] == [said, FEEDBACK]
    assert first.text == said.replace(EOS, "")
    assert (second.invalid, second.query) == (False, "b")
    assert [call[0] for call in search.calls] == [("b",)]
    assert engine.contexts[1].endswith(said + FEEDBACK)


async def test_a_query_inside_forged_information_is_still_only_the_policy_talking() -> None:
    forged = "<information>\nDoc 1(Title: F) f\n</information><important_info>[2]</important_info>"
    trajectory, _, _ = await play(forged + query("b"), DONE)
    assert [d.id for d in trajectory.documents] == ["r2", "b1"]


async def test_searches_then_one_last_turn_without() -> None:
    """T=2: three searching generations, and a fourth whose query is ignored but whose selection counts."""
    last = f"<important_info>[1]</important_info>{query('a')}"
    trajectory, _, search = await play(query("b"), query("b"), query("a"), last)
    assert trajectory.stop is Stop.TURN_LIMIT
    assert (len(trajectory.turns), len(search.calls), trajectory.searches) == (4, 3, 3)
    turn = trajectory.turns[-1]
    assert (turn.query, turn.selected, turn.invalid, turn.result) == (None, (1,), False, None)
    assert [s.role for s in turn.segments] == [Role.POLICY]
    assert [d.id for d in trajectory.documents] == ["a1", "r1", "r2", "b1"]


async def test_the_last_turn_may_complete_or_say_nothing() -> None:
    trajectory, _, _ = await play(*[query("b")] * 3, DONE)
    assert trajectory.stop is Stop.FINISHED
    trajectory, _, _ = await play(*[f"hm{EOS}"] * 4)
    assert (trajectory.stop, len(trajectory.turns)) == (Stop.TURN_LIMIT, 4)
    assert all(turn.invalid for turn in trajectory.turns)
    assert [len(turn.segments) for turn in trajectory.turns] == [2, 2, 2, 1]


async def test_a_search_without_hits_is_an_empty_block() -> None:
    trajectory, _, _ = await play(query("none"), f"<important_info>[1]</important_info>{DONE}")
    assert text_of(trajectory.turns[0].segments[1].ids) == block()
    assert trajectory.turns[1].selected == ()
    assert (trajectory.searches, trajectory.documents) == (1, docs("r1", "r2"))


async def test_a_failed_search_is_data() -> None:
    trajectory, _, _ = await play(query("b"), query("down"))
    assert trajectory.stop is Stop.FAILED
    assert trajectory.error == f"RetrieverError: {RETRIEVER_DOWN}"
    assert [turn.query for turn in trajectory.turns] == ["b", "down"]
    assert trajectory.turns[1].result is None
    assert trajectory.documents == ()


async def test_a_failed_engine_is_data() -> None:
    trajectory, _, _ = await play(query("b"), ENGINE_DOWN)
    assert (trajectory.stop, trajectory.error) == (Stop.FAILED, f"EngineError: {ENGINE_DOWN}")
    assert len(trajectory.turns) == 1 and trajectory.turns[0].result is not None


async def test_a_search_that_answers_too_little_is_a_failure() -> None:
    async def mute(queries: Sequence[str], topk: int) -> list[SearchResult]:
        return []

    trajectory = await run(question(), S3Grammar(CONFIG), ScriptedEngine(query("a")), mute, CharTokenizer(), GREEDY)
    assert trajectory.stop is Stop.FAILED
    assert "0 results for 1 query" in trajectory.error


async def test_a_bug_propagates() -> None:
    with pytest.raises(KeyError):
        await play(query("not in the dictionary"))


async def test_documents_that_do_not_fit_are_dropped_whole_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, max_observation_tokens=len(block("a1", "a2")))
    with caplog.at_level(logging.INFO, logger="verl.agent.loop"):
        trajectory, _, _ = await play(query("a"), f"<important_info>[3, 2]</important_info>{DONE}", config=config)
    turn = trajectory.turns[0]
    assert turn.dropped == 1
    assert turn.result is not None and turn.result.documents == docs("a1", "a2")
    assert turn.result.scores == (3.0, 2.0)
    assert text_of(turn.segments[1].ids) == block("a1", "a2")
    assert trajectory.turns[1].selected == (2,)
    assert "1 documents did not fit" in caplog.text


async def test_an_observation_keeps_its_closing_tag_even_when_nothing_fits() -> None:
    config = replace(CONFIG, max_observation_tokens=1)
    trajectory, _, _ = await play(query("a"), DONE, config=config)
    assert text_of(trajectory.turns[0].segments[1].ids) == block()
    assert trajectory.turns[0].dropped == 3


async def test_an_over_long_prompt_is_not_searched() -> None:
    config = replace(CONFIG, max_prompt_tokens=20)
    trajectory, engine, _ = await play(config=config)
    assert (trajectory.stop, trajectory.turns, engine.contexts) == (Stop.LENGTH, (), [])
    assert trajectory.documents == docs("r1", "r2")


async def test_an_observation_that_does_not_fit_the_context_was_not_shown() -> None:
    prompt = len((await play(DONE))[0].prompt_ids)
    room = prompt + len(query("a")) + len(block("a1", "a2", "a3"))
    fits = replace(CONFIG, max_prompt_tokens=prompt, max_context_tokens=room + 1)
    trajectory, engine, _ = await play(query("a"), "x", config=fits)
    assert (trajectory.stop, len(trajectory.turns)) == (Stop.LENGTH, 2)
    assert engine.samplings[1].max_tokens == 1
    trajectory, _, _ = await play(query("a"), config=replace(fits, max_context_tokens=room))
    assert trajectory.stop is Stop.LENGTH
    assert (trajectory.turns[0].query, trajectory.turns[0].result) == ("a", None)
    assert trajectory.documents == docs("r1", "r2")
    assert len(trajectory.turns[0].segments) == 1


async def test_a_context_that_ends_within_a_turn() -> None:
    prompt = len((await play(DONE))[0].prompt_ids)
    config = replace(CONFIG, max_prompt_tokens=prompt, max_context_tokens=prompt + 30)
    trajectory, _, search = await play("x" * 30, config=config)
    assert (trajectory.stop, trajectory.turns[0].invalid, search.calls) == (Stop.LENGTH, True, [])
    exact = replace(config, max_context_tokens=prompt + len(DONE))
    assert (await play(DONE, config=exact))[0].stop is Stop.FINISHED


async def test_the_grammar_sets_stop_strings_and_budget_and_seeds_differ_by_generation() -> None:
    engine = ScriptedEngine(query("b"), DONE)
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=7, seed=5)
    await run(question(), S3Grammar(CONFIG), engine, DictSearch(SEARCH), CharTokenizer(), sampling)
    expected = replace(sampling, max_tokens=120, stop=("</query>", "</search_complete>"))
    assert engine.samplings == [replace(expected, seed=derive_seed(5, i)) for i in (0, 1)]
    assert derive_seed(5, 0) != derive_seed(5, 1)
    assert derive_seed(None, 3) is None


async def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(GrammarError, match="no chat template"):
        await run(question(), S3Grammar(CONFIG), ScriptedEngine(), DictSearch({}), tokenizer, GREEDY)


class Babbler:
    """An engine that repeats one text for ever, cut at stop strings and budget as an engine must."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.said = 0
        self.calls = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Say the next piece."""
        self.calls += 1
        said = ""
        while len(said) < sampling.max_tokens:
            said += self.text[self.said % len(self.text)]
            self.said += 1
            if said.endswith((EOS, *sampling.stop)):
                break
        ended = said.endswith((EOS, *sampling.stop))
        ids = tuple(map(ord, said))
        return Generation(ids, (0.0,) * len(ids), said.replace(EOS, ""), "stop" if ended else "length", 0)


@given(st.lists(POLICY_TEXT, min_size=1, max_size=4).map("".join).filter(bool))
def test_any_policy_comes_to_an_end(text: str) -> None:
    async def search(queries: Sequence[str], topk: int) -> list[SearchResult]:
        (asked,) = queries
        return [SearchResult(asked, docs("x", "y"), (2.0, 1.0))]

    engine = Babbler(text)
    asked = question(docs("r"))
    trajectory = asyncio.run(run(asked, S3Grammar(CONFIG), engine, search, CharTokenizer(), GREEDY))
    assert trajectory.stop is not Stop.FAILED
    assert 1 <= len(trajectory.turns) <= CONFIG.max_turns + 2
    assert trajectory.searches <= CONFIG.max_turns + 1
    for turn in trajectory.turns:
        assert sum(len(s.ids) for s in turn.segments if s.role is Role.POLICY) <= CONFIG.max_generation_tokens
    total = len(trajectory.prompt_ids) + sum(len(s.ids) for s in trajectory.segments)
    assert total <= CONFIG.max_context_tokens
    assert set(trajectory.documents) <= {*docs("r"), *docs("x", "y")}


class OneShot:
    """A rewriting grammar: the whole text is the query, searched once, and nothing more is generated."""

    stop: tuple[str, ...] = ()
    limits = Limits(2, 1, 50, 100, 1000, 2000)

    def prompt_messages(self, question: Question) -> list[dict[str, str]]:
        return [{"role": "user", "content": question.text}]

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        return Action(query=text, finished=True)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        raise AssertionError("a finished turn is not answered")

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        return turns[-1].result.documents if turns[-1].result else ()


async def test_a_grammar_may_search_and_finish_at_once() -> None:
    trajectory = await run(
        question(), OneShot(), ScriptedEngine(f"a{EOS}"), DictSearch(SEARCH), CharTokenizer(), GREEDY
    )
    assert (trajectory.stop, trajectory.documents) == (Stop.FINISHED, docs("a1", "a2", "a3"))
    assert len(trajectory.segments) == 1


class Talking(OneShot):
    """Asks the user back twice: first in the same conversation, then in a new one; the third text is the answer."""

    limits = Limits(3, 2, 50, 100, 58, 2000)

    def __init__(self, rebuild: bool) -> None:
        self.rebuild = rebuild

    def parse(self, question: Question, turns: Sequence[Turn], text: str) -> Action:
        return Action(answer=text, finished=True) if len(turns) == 2 else Action(query=text)

    async def observe(self, question: Question, turns: Sequence[Turn], result: SearchResult | None) -> Observation:
        assert result is not None
        items = tuple(document.title for document in result.documents)

        def messages(count: int) -> list[dict[str, str]]:
            return [{"role": "user", "content": f"new {items[:count]}"}]

        return Observation("seen:", items, as_user=True, rebuild=messages if self.rebuild else None)

    def assemble(self, question: Question, turns: Sequence[Turn]) -> tuple[Document, ...]:
        return ()


@pytest.mark.parametrize("ending", [EOS, "."])
async def test_an_observation_may_be_a_turn_of_the_user(ending: str) -> None:
    grammar = Talking(rebuild=False)
    grammar.stop = (".",)
    engine = ScriptedEngine(f"b{ending}", f"b{ending}", f"done{EOS}")
    search = DictSearch(SEARCH | {"b.": docs("b1")})
    trajectory = await run(question(), grammar, engine, search, CharTokenizer(), GREEDY)
    between = f"\n<|im_start|>user\nseen:Tb1{EOS}\n<|im_start|>assistant\n"
    said = "b" if ending == EOS else "b."
    assert engine.contexts[2] == engine.contexts[0] + f"{said}{EOS}{between}" * 2, "one end of turn, whoever wrote it"
    assert (trajectory.answer, trajectory.stop) == ("done", Stop.FINISHED)


async def test_a_grammar_may_rebuild_the_conversation() -> None:
    engine = ScriptedEngine(f"a{EOS}", f"b{EOS}", f"done{EOS}")
    trajectory = await run(question(), Talking(rebuild=True), engine, DictSearch(SEARCH), CharTokenizer(), GREEDY)
    shown = "<|im_start|>user\nnew ('Ta1',)\0\n<|im_start|>assistant\n"
    assert engine.contexts[1] == shown, "the documents that do not fit 60 tokens are dropped"
    assert trajectory.turns[0].dropped == 2 and trajectory.turns[0].result.documents == docs("a1")
    assert [text_of(turn.prompt_ids) for turn in trajectory.turns] == ["", *engine.contexts[1:]]
    with pytest.raises(ValueError, match="rebuilt between turns"):
        collate([trajectory], 0)


async def test_a_template_that_hides_the_assistants_words_is_refused() -> None:
    class Hiding(CharTokenizer):
        def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> list[int] | str:
            return super().apply_chat_template(conversation[:1], **kwargs)

    with pytest.raises(GrammarError, match="no user turn after an assistant's"):
        user_turn(Hiding(), "hello", closed=False)


class Slow:
    """Completes every question at once, except those whose text says to wait; counts how many run."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self.release = asyncio.Event()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Complete, or wait for `release`."""
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if "wait" in text_of(prompt_ids):
                await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if "fail" in text_of(prompt_ids):
            raise ENGINE_DOWN
        ids = tuple(map(ord, DONE))
        return Generation(ids, (float(sampling.seed or 0),) * len(ids), DONE, "stop", 0)


def many(*texts: str) -> list[Question]:
    return [question(text=text, id=str(i)) for i, text in enumerate(texts)]


async def test_gather_yields_in_order_of_finishing_and_bounds_concurrency() -> None:
    engine = Slow()
    asked = iter(many("wait", "b", "fail", "d", "e"))
    order = []
    stream = gather(asked, S3Grammar(CONFIG), engine, DictSearch({}), CharTokenizer(), GREEDY, concurrency=2)
    async for trajectory in stream:
        order.append((trajectory.question.text, trajectory.stop))
        if len(order) == 4:
            engine.release.set()
    done = Stop.FINISHED
    assert order == [("b", done), ("fail", Stop.FAILED), ("d", done), ("e", done), ("wait", done)]
    assert engine.most == 2


async def test_gather_seeds_repetitions_of_a_question_differently() -> None:
    async def seeds(seed: int | None) -> list[float]:
        sampling = Sampling(seed=seed)
        stream = gather(many("a") * 4, S3Grammar(CONFIG), Slow(), DictSearch({}), CharTokenizer(), sampling, 1)
        return [trajectory.segments[0].logprobs[0] async for trajectory in stream]

    first = await seeds(3)
    assert len(set(first)) == 4
    assert first == await seeds(3) != await seeds(4)
    assert await seeds(None) == [0.0] * 4


async def test_gather_cancels_what_runs_when_its_consumer_leaves() -> None:
    engine = Slow()
    stream = gather(many("a", "wait", "wait"), S3Grammar(CONFIG), engine, DictSearch({}), CharTokenizer(), GREEDY)
    assert (await anext(stream)).question.text == "a"
    await stream.aclose()
    assert (engine.cancelled, engine.running) == (2, 0)


async def test_gather_of_nothing_and_of_wrong_concurrency() -> None:
    def stream(concurrency: int):
        return gather([], S3Grammar(CONFIG), Slow(), DictSearch({}), CharTokenizer(), GREEDY, concurrency)

    assert [t async for t in stream(1)] == []
    with pytest.raises(ValueError, match="concurrency=0"):
        await anext(stream(0))
