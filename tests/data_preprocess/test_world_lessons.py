"""Lessons are token for token what the models meet at run time."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_preprocess.world import gate, lessons
from data_preprocess.world.lessons import Lesson, LessonMaker, chains, draw_facts
from data_preprocess.world.tokenizer import train_tokenizer
from generator_llms import prompts
from verl.agent import loop
from verl.agent.grammar.s3 import S3Grammar
from verl.agent.protocols import Generation, Sampling
from verl.config import compose
from verl.records import parse_documents
from verl.rewards.text import span_match
from verl.trainer.config import TrainConfig
from verl.types import Document, Question, Role, SearchResult, Stop, Trajectory

CHECKPOINTS = Path(lessons.__file__).parent / "checkpoints"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of a lesson that are all learned, or all not."""

    learned: bool
    ids: tuple[int, ...]


def runs(lesson: Lesson) -> list[Run]:
    """Cut a lesson where it changes between given and learned."""
    pairs = itertools.groupby(zip(lesson.learned, lesson.ids, strict=True), key=lambda pair: pair[0])
    return [Run(learned, tuple(token for _, token in group)) for learned, group in pairs]


def block_documents(text: str) -> tuple[Document, ...]:
    """Read the passages of the last information block of a text."""
    block = text.rpartition("<information>\n")[2].partition("\n</information>")[0]
    return tuple(Document(title.lower(), title, body) for title, body in parse_documents(block))


class Replay:
    """Engine and retriever that do what the lesson did, and insist that they are asked as the lesson was."""

    def __init__(self, lesson: Lesson, tokenizer: PreTrainedTokenizerFast) -> None:
        self.lesson, self.tokenizer = lesson, tokenizer
        self.runs = runs(lesson)
        self.prompt = tokenizer.decode(list(self.runs[0].ids))
        self.turn = 0

    def question(self) -> Question:
        """The question as the prompt tells it, with its round-0 passages."""
        text = self.prompt.partition("<question>\n")[2].partition("\n</question>")[0]
        return Question("world/1", text, ("?",), "world", initial_documents=block_documents(self.prompt))

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Say the next learned run."""
        said = self.runs[2 * self.turn + 1].ids
        before = sum(len(run.ids) for run in self.runs[: 2 * self.turn + 1])
        assert list(prompt_ids) == self.lesson.ids[:before]
        self.turn += 1
        text = self.tokenizer.decode(list(said))
        ends = [text.find(stop) + len(stop) for stop in sampling.stop if stop in text]
        assert min(ends) == len(text), "the lesson ends where the first stop string does"
        return Generation(said, (0.0,) * len(said), text, "stop", 0)

    async def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Return the passages that the lesson's next block shows."""
        (query,) = queries
        found = block_documents(self.tokenizer.decode(list(self.runs[2 * self.turn].ids)))
        assert len(found) <= topk
        return [SearchResult(query, found, (1.0,) * len(found))]


async def replayed(lesson: Lesson, tokenizer: PreTrainedTokenizerFast) -> Trajectory:
    """Play the lesson through the real loop and grammar."""
    replay = Replay(lesson, tokenizer)
    sampling = Sampling(temperature=0.0)
    return await loop.run(replay.question(), S3Grammar(gate.SEARCH), replay, replay.search, tokenizer, sampling)


def tokens_of(trajectory: Trajectory) -> tuple[list[int], list[bool]]:
    """All ids of a trajectory, and which the policy sampled."""
    ids, policy = list(trajectory.prompt_ids), [False] * len(trajectory.prompt_ids)
    for segment in trajectory.segments:
        ids += segment.ids
        policy += [segment.role is Role.POLICY] * len(segment.ids)
    return ids, policy


@pytest.mark.parametrize("expert", [1.0, 0.0])
async def test_the_real_loop_replays_every_trajectory_token_for_token(
    tokenizer: PreTrainedTokenizerFast, expert: float
) -> None:
    maker = LessonMaker(tokenizer, seed=5)
    turns = Counter()
    for _ in range(60):
        lesson = maker.searching(expert)
        trajectory = await replayed(lesson, tokenizer)
        assert trajectory.stop is Stop.FINISHED
        assert tokens_of(trajectory) == (lesson.ids, lesson.learned)
        turns[len(trajectory.turns)] += 1
    assert set(turns) == {1, 2}


async def test_an_expert_finds_exactly_what_the_answer_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = LessonMaker(tokenizer, seed=6)
    hops = Counter()
    for _ in range(60):
        trajectory = await replayed(maker.searching(1.0), tokenizer)
        relations = re.findall(r"the (\w+) of", trajectory.question.text)
        relations = [dict(zip(lessons.RELATIONS.values(), lessons.RELATIONS, strict=True)).get(r, r) for r in relations]
        subject = trajectory.question.text.split()[-1].rstrip("?")
        titles = [document.title for document in trajectory.documents]
        hops[len(relations)] += 1
        if len(relations) == 1:
            assert titles == [subject]
            continue
        shown = trajectory.question.initial_documents
        passage = next(document for document in shown if document.title == subject)
        bridge = re.search(rf"The {relations[1]} of {subject} is (\w+)\.", passage.text)
        assert bridge is not None
        thought = f"<think>{bridge[0]}</think>\n"
        assert trajectory.turns[0].text.startswith(thought), "the expert restates the first fact"
        assert trajectory.turns[0].query == f"{relations[0]} of {bridge[1]}"
        assert titles[0] == bridge[1]
        assert titles == list(dict.fromkeys([bridge[1], *(document.title for document in shown)]))
    assert set(hops) == {1, 2}


async def test_a_poor_player_mostly_misses_what_the_answer_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = LessonMaker(tokenizer, seed=7)
    queries: Counter[bool] = Counter()
    for _ in range(80):
        trajectory = await replayed(maker.searching(0.0), tokenizer)
        two_hop = trajectory.question.text.count(" the ") == 2
        queries[two_hop] += trajectory.searches
        assert not any(turn.invalid for turn in trajectory.turns), "poor play is in the protocol all the same"
        assert "<think>" not in trajectory.turns[0].text
    assert queries[True] and queries[False]


def test_answering_asks_as_the_generators_prompt_does(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = LessonMaker(tokenizer, seed=8)
    for documents in (1, 3, 9):
        for _ in range(10):
            assert_chat(maker.answering(documents), documents, tokenizer)


def assert_chat(lesson: Lesson, documents: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rebuild the conversation from its text by the run-time functions, and compare ids at each of its turns."""
    parts = runs(lesson)
    system, _, rest = tokenizer.decode(list(parts[0].ids)).partition("<|im_end|>\n<|im_start|>user\n")
    passages = tuple(Document(t.lower(), t, b) for t, b in parse_documents(system.partition("Contexts:\n")[2]))
    assert len(passages) == documents
    first = Question("", rest.partition("<|im_end|>")[0], ("?",), "world")
    messages = [dict(message) for message in prompts.build("context", first, passages)]
    done: list[int] = []
    for given, reply in itertools.pairwise([*parts]):
        done += given.ids
        if not reply.learned:
            continue
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == done
        answer = tokenizer.decode(list(reply.ids)).removesuffix("<|im_end|>")
        assert_answer(answer, str(messages[-1]["content"]), passages)
        messages.append({"role": "assistant", "content": answer})
        following = tokenizer.decode(lesson.ids[len(done) + len(reply.ids) :])
        asked = following.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        messages.append({"role": "user", "content": asked})


def assert_answer(reply: str, asked: str, passages: Sequence[Document]) -> None:
    """The reply quotes sentences that stand in the passages, as many as there are hops, then gives the last object."""
    quotes = re.findall(r"The \w+ of \w+ is \w+\.", reply)
    assert len(quotes) == asked.count("the ")
    evidence = " ".join(document.text for document in passages)
    assert all(quote in evidence for quote in quotes)
    answer = prompts.final_answer(reply)
    assert span_match(answer, [quotes[-1].split()[-1].rstrip(".")])
    assert reply == f"{' '.join(quotes)} <answer> {answer} </answer>"


def test_the_learned_facts_are_the_tokens_that_must_be_looked_up(tokenizer: PreTrainedTokenizerFast) -> None:
    lesson = LessonMaker(tokenizer, seed=9).answering(4)
    words = [tokenizer.decode([token]) for token in lesson.ids]
    for index, (learned, fact) in enumerate(zip(lesson.learned, lesson.facts, strict=True)):
        assert fact == (learned and words[index - 1] == " is")
    assert sum(lesson.facts) == sum(
        len(re.findall(r" is \w+\.", tokenizer.decode(list(run.ids)))) for run in runs(lesson) if run.learned
    )
    assert len(lesson.ids) == len(lesson.learned) == len(lesson.facts)


def test_lessons_follow_from_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    def drawn(seed: int) -> list[Lesson]:
        maker = LessonMaker(tokenizer, seed)
        return [maker.answering(3), maker.searching(0.5), maker.searching(0.5)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_chains_are_read_off_the_facts() -> None:
    facts = {"A": {"heir": "B", "ally": "X"}, "B": {"rival": "A", "guard": "C"}}
    one, two = chains(facts)
    assert [(c.subjects, c.relations, c.answer) for c in one] == [
        (("A",), ("heir",), "B"),
        (("A",), ("ally",), "X"),
        (("B",), ("rival",), "A"),
        (("B",), ("guard",), "C"),
    ]
    # A-heir-B-rival-A returns to its subject; B-rival-A-heir-B too.
    assert [(c.subjects, c.relations, c.answer) for c in two] == [
        (("A", "B"), ("heir", "guard"), "C"),
        (("B", "A"), ("rival", "ally"), "X"),
    ]
    assert two[0].quote() == "The heir of A is B. The guard of B is C."


def test_lessons_hold_chains_because_objects_are_often_subjects() -> None:
    rng = random.Random(0)
    subjects = ["A", "B", "C", "D", "E"]
    objects = [value for _ in range(200) for about in draw_facts(rng, subjects).values() for value in about.values()]
    linked = sum(value in subjects for value in objects) / len(objects)
    assert linked == pytest.approx(lessons.LINKED, abs=0.05)
    assert all(subject not in about.values() for subject, about in draw_facts(rng, subjects).items())


@pytest.mark.parametrize("name", ["generator", "searcher"])
def test_the_committed_tokenizers_are_the_trained_one_however_they_are_loaded(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    loaded = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    maker = LessonMaker(tokenizer, seed=10)
    for lesson in (maker.answering(5), maker.searching(1.0), maker.searching(0.0)):
        text = tokenizer.decode(lesson.ids)
        assert loaded.encode(text, add_special_tokens=False) == lesson.ids
        assert loaded.decode(lesson.ids) == text
    messages = [{"role": "user", "content": "Who is the heir of Bana?"}]
    rendered = [
        t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (tokenizer, loaded)
    ]
    assert rendered[0] == rendered[1]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_lessons_protocol_is_the_gates_and_the_quickstarts() -> None:
    recipe = compose("train", ["recipe=quickstart"], TrainConfig).search
    assert recipe == gate.SEARCH
    assert (recipe.topk, recipe.max_selected, recipe.max_turns) == (3, 3, 3)
