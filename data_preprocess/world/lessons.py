"""Supervised lessons for the tiny models, drawn without end from fresh little worlds.

A lesson is a chat in exactly the format that the frozen generator's prompt and the s3 grammar use at run time, with a
mask that says which tokens are learned (the assistant's).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from data_preprocess.world.language import FACTS_PER_ENTITY, RELATIONS, World, names, question_text, sentence
from generator_llms import prompts
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.types import Document, Question

LINKED = 0.6  # share of objects that are subjects of another passage of the lesson, so that chains exist
STOP = "<search_complete>True</search_complete>"
# Poor ways to play, with their weights: stop at once, ask about the first subject again, ask about someone else.
POOR_TWO_HOP = {"stop": 0.5, "repeat": 0.3, "wander": 0.2}
POOR_ONE_HOP = {"misselect": 0.5, "wander": 0.5}
SYNONYM = 0.2  # share of questions in other words than the passage


@dataclass(frozen=True)
class Lesson:
    """Token ids and, aligned with them, whether each is learned and whether it is a looked-up fact (the hard part)."""

    ids: list[int]
    learned: list[bool]
    facts: list[bool]


@dataclass(frozen=True)
class Chain:
    """A question over the lesson's facts: `subjects[i]` stands in `relations[i]` to the next subject or the answer."""

    subjects: tuple[str, ...]
    relations: tuple[str, ...]
    answer: str

    def quote(self) -> str:
        """Restate the evidence, one sentence a hop."""
        ends = (*self.subjects[1:], self.answer)
        return " ".join(sentence(*fact) for fact in zip(self.relations, self.subjects, ends, strict=True))

    def ask(self, rng: random.Random) -> str:
        """Word the question, each relation in other words than the passage with probability SYNONYM."""
        worded = [RELATIONS[r] if rng.random() < SYNONYM else r for r in self.relations]
        return question_text(self.subjects[0], worded)


def draw_facts(rng: random.Random, subjects: Sequence[str]) -> dict[str, dict[str, str]]:
    """Draw facts about `subjects`; a share LINKED of the objects are subjects themselves."""
    pool = names()
    facts = {}
    for subject in subjects:
        relations = rng.sample(list(RELATIONS), FACTS_PER_ENTITY)
        linked = [name for name in subjects if name != subject] or pool
        objects = [rng.choice(linked if rng.random() < LINKED else pool) for _ in relations]
        facts[subject] = {r: o for r, o in zip(relations, objects, strict=True) if o != subject}
    return facts


def chains(facts: dict[str, dict[str, str]]) -> tuple[list[Chain], list[Chain]]:
    """Return the 1-hop and 2-hop chains that the facts hold."""
    one, two = [], []
    for subject, about in facts.items():
        for relation, value in about.items():
            one.append(Chain((subject,), (relation,), value))
            two += [
                Chain((subject, value), (relation, second), answer)
                for second, answer in facts.get(value, {}).items()
                if answer != subject
            ]
    return one, two


def final_answer_text(chain: Chain) -> str:
    """The generator's reply: evidence first, then the answer in tags."""
    return f"{chain.quote()} <answer> {chain.answer} </answer>"


class LessonMaker:
    """Draws lessons from one seeded generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.grammar = S3Grammar(S3Config(topk=3, max_selected=3, max_turns=3, prompt="compact"))
        (self._is,) = self._encode(" is")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self._encode(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _passages(self, facts: dict[str, dict[str, str]]) -> list[Document]:
        return World(facts).passages()

    def answering(self, documents: int, turns: int = 6) -> Lesson:
        """Several questions over one context, answered by quoting."""
        facts = draw_facts(self.rng, self.rng.sample(names(), documents))
        one, two = chains(facts)
        self.rng.shuffle(one)
        self.rng.shuffle(two)
        asked = two[: turns // 2] + one[: turns - min(len(two), turns // 2)]
        self.rng.shuffle(asked)
        ids: list[int] = []
        learned: list[bool] = []
        for index, chain in enumerate(asked):
            question = Question("", chain.ask(self.rng), (chain.answer,), "world")
            if index == 0:
                prompt = self.chat(prompts.build("context", question, self._passages(facts)))
            else:
                prompt = self._encode(f"\n<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
            reply = self._encode(f"{final_answer_text(chain)}<|im_end|>")
            ids += prompt + reply
            learned += [False] * len(prompt) + [True] * len(reply)
        return self._lesson(ids, learned)

    def _lesson(self, ids: list[int], learned: list[bool]) -> Lesson:
        """A fact is the learned token after " is"."""
        before = [None, *ids[:-1]]
        return Lesson(ids, learned, [mark and token == self._is for mark, token in zip(learned, before, strict=True)])

    def searching(self, expert: float = 1.0) -> Lesson:
        """One s3 trajectory over a small world.

        With probability `expert` it is played well: read, think, query the bridge, select, stop. Otherwise it is one
        of the poor ways to play in POOR_TWO_HOP and POOR_ONE_HOP.
        """
        facts = draw_facts(self.rng, self.rng.sample(names(), self.rng.randint(4, 8)))
        one, two = chains(facts)
        chain = self.rng.choice(two if two and self.rng.random() < 0.65 else one)
        shown = self.retrieved(facts, chain.subjects[0])
        question = Question("", chain.ask(self.rng), (chain.answer,), "world", initial_documents=shown)
        parts = [(self.chat(self.grammar.prompt_messages(question)), False)]
        first_turn, target = self._open(chain, shown, self.rng.random() < expert)
        parts.append((first_turn, True))
        if target:
            shown = self.retrieved(facts, target)
            parts += [(self.grammar.observation_text(shown), False), (select_and_stop(shown, target), True)]
        return self.trajectory(parts)

    def _open(self, chain: Chain, shown: Sequence[Document], expert: bool) -> tuple[str, str]:
        """Return the first turn and the subject of the search that it starts ("" when it stops instead)."""
        rng, subject = self.rng, chain.subjects[0]
        two_hop = len(chain.subjects) == 2
        poor = POOR_TWO_HOP if two_hop else POOR_ONE_HOP
        way = "expert" if expert else rng.choices(list(poor), list(poor.values()))[0]
        other = rng.choice([d.title for d in shown if d.title != subject] or [subject])
        if way == "expert" and two_hop:
            return search_turn(chain), chain.subjects[1]
        if way in ("expert", "stop"):
            return select_and_stop(shown, subject), ""
        if way == "misselect":
            return select_and_stop(shown, other), ""
        target = subject if way == "repeat" else other
        return query_text(chain.relations[-1], target), target

    def retrieved(self, facts: dict[str, dict[str, str]], subject: str) -> tuple[Document, ...]:
        """What BM25 tends to return for a query about `subject`: its passage first, then ones that mention it.

        A subject without a passage of its own (a name that only occurs as an object) gets the mentions alone.
        """
        mention = [s for s, about in facts.items() if s != subject and subject in about.values()]
        other = [s for s in facts if s != subject and s not in mention]
        self.rng.shuffle(mention)
        self.rng.shuffle(other)
        chosen = (([subject] if subject in facts else []) + mention + other)[:3]
        if self.rng.random() < 0.2:
            self.rng.shuffle(chosen)
        world = World(facts)
        return tuple(world.passage(s) for s in chosen)

    def trajectory(self, parts: Sequence[tuple[str | list[int], bool]]) -> Lesson:
        ids: list[int] = []
        learned: list[bool] = []
        for part, is_learned in parts:
            piece = self._encode(part) if isinstance(part, str) else part
            ids += piece
            learned += [is_learned] * len(piece)
        return self._lesson(ids, learned)


def query_text(relation: str, subject: str) -> str:
    """A query in the protocol's JSON."""
    return f'<query>{{"query": "{relation} of {subject}"}}</query>'


def search_turn(chain: Chain) -> str:
    """The expert's first turn on a 2-hop question: restate the first fact, then query the bridge."""
    thought = sentence(chain.relations[0], chain.subjects[0], chain.subjects[1])
    return f"<think>{thought}</think>\n{query_text(chain.relations[1], chain.subjects[1])}"


def select_and_stop(shown: Sequence[Document], title: str) -> str:
    """Select the passage about `title` from the latest block (the first one if there is none) and stop."""
    titles = [document.title for document in shown]
    index = titles.index(title) + 1 if title in titles else 1
    return f"<important_info>[{index}]</important_info>\n{STOP}"
