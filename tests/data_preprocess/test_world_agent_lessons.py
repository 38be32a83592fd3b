"""The baselines' lessons are what the real loop and grammars make of them, token for token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from data_preprocess.world import gate
from data_preprocess.world.agent_lessons import DONE, AgentLessons
from data_preprocess.world.language import RELATIONS
from data_preprocess.world.lessons import Lesson
from data_preprocess.world.tokenizer import train_tokenizer
from tests.data_preprocess.test_world_lessons import Replay, tokens_of
from verl.agent import loop
from verl.agent.grammar.ircot import IRCoTGrammar
from verl.agent.grammar.registry import build_grammar
from verl.agent.protocols import Sampling
from verl.records import parse_documents
from verl.types import Document, SearchResult, Stop, Trajectory

Draw = Callable[[AgentLessons], Lesson]
GROWING: dict[str, Draw] = {"Search-R1": AgentLessons.search_r1, "Search-o1": AgentLessons.search_o1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


class BlockReplay(Replay):
    """Reads the passages of blocks in these protocols' form."""

    async def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        block = self.tokenizer.decode(list(self.runs[2 * self.turn].ids))
        text = re.search(r"Doc 1.*?(?=</information>|<.end_search_result.>)", block, re.DOTALL)
        assert text is not None
        found = tuple(Document(title.lower(), title, body) for title, body in parse_documents(text[0]))
        return [SearchResult(queries[0], found, (1.0,) * len(found))]


async def played(lesson: Lesson, protocol: str, tokenizer: PreTrainedTokenizerFast) -> Trajectory:
    replay = BlockReplay(lesson, tokenizer)
    grammar = build_grammar(gate.AGENT[protocol])
    return await loop.run(replay.question(), grammar, replay, replay.search, tokenizer, Sampling(temperature=0.0))


def worded(trajectory: Trajectory) -> list[str]:
    """The question's relations in the words of the passages, last hop first."""
    back = {question: passage for passage, question in RELATIONS.items()}
    return [back.get(word, word) for word in re.findall(r"the (\w+) of", trajectory.question.text)]


@pytest.mark.parametrize("protocol", GROWING)
@pytest.mark.parametrize("expert", [1.0, 0.0])
async def test_the_real_loop_replays_every_trajectory(
    tokenizer: PreTrainedTokenizerFast, protocol: str, expert: float
) -> None:
    lessons = AgentLessons(tokenizer, 5, expert)
    searches: Counter[int] = Counter()
    for _ in range(40):
        lesson = GROWING[protocol](lessons)
        trajectory = await played(lesson, protocol, tokenizer)
        assert trajectory.stop is Stop.FINISHED and trajectory.valid
        assert tokens_of(trajectory) == (lesson.ids, lesson.learned)
        assert trajectory.answer == trajectory.turns[-1].text.partition("<answer>")[2].removesuffix("</answer>")
        relations = worded(trajectory)
        asked = [turn.query.partition(" of ")[0] for turn in trajectory.turns if turn.query]
        assert asked == relations[::-1][: len(asked)], "one query a hop, in the passages' words"
        searches[trajectory.searches] += 1
    assert set(searches) == ({1, 2} if expert else {1})


@pytest.mark.parametrize("rewriting", [1.0, 0.0])
async def test_a_rewriting_lesson_translates_in_the_share_that_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, rewriting: float
) -> None:
    lessons = AgentLessons(tokenizer, 6, rewriting=rewriting)
    translated: Counter[bool] = Counter()
    for _ in range(60):
        lesson = lessons.deepretrieval()
        replay = Replay(lesson, tokenizer)

        async def found(queries: list[str], topk: int) -> list[object]:
            return [SearchResult(queries[0], (), ())]

        grammar = build_grammar(gate.AGENT["DeepRetrieval"])
        trajectory = await loop.run(replay.question(), grammar, replay, found, tokenizer, Sampling())  # type: ignore[arg-type]
        assert tokens_of(trajectory) == (lesson.ids, lesson.learned)
        asked = re.findall(r"the (\w+) of (\w+)", trajectory.question.text)[0]
        used = trajectory.turns[0].query.split(" of ")
        assert used[1] == asked[1] and used[0] in (asked[0], worded(trajectory)[0])
        if asked[0] != worded(trajectory)[0]:
            translated[used[0] != asked[0]] += 1
    assert set(translated) == {bool(rewriting)}


def test_a_step_of_ircot_is_asked_for_as_the_grammar_asks(tokenizer: PreTrainedTokenizerFast) -> None:
    lessons = AgentLessons(tokenizer, 7)
    grammar = gate.build_grammar(gate.AGENT["IRCoT"])
    assert isinstance(grammar, IRCoTGrammar)
    kinds: Counter[tuple[int, bool]] = Counter()
    for _ in range(60):
        lesson = lessons.ircot()
        said = tokenizer.decode([token for token, learned in zip(lesson.ids, lesson.learned, strict=True) if learned])
        prompt = tokenizer.decode(
            [token for token, learned in zip(lesson.ids, lesson.learned, strict=True) if not learned]
        )
        steps = re.findall(r"^\d\. (.+)$", prompt, re.MULTILINE)
        action = grammar.parse(Replay(lesson, tokenizer).question(), (), said.replace("<|im_end|>", ""))
        assert action.finished == said.endswith(DONE)
        assert said.startswith("The ") and not action.invalid
        kinds[len(steps), action.finished] += 1
    assert set(kinds) == {(0, True), (0, False), (1, True)}
