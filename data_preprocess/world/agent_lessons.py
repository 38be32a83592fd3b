"""Lessons in the baselines' protocols: Search-R1, Search-o1, IRCoT and DeepRetrieval, each in its compact form."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from data_preprocess.world.language import RELATIONS, names, question_text, sentence
from data_preprocess.world.lessons import Chain, Lesson, LessonMaker, chains, draw_facts
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.agent.grammar.ircot import IRCoTConfig, IRCoTGrammar
from verl.agent.grammar.search_o1 import QUERY_END, QUERY_START, SearchO1Config, SearchO1Grammar
from verl.agent.grammar.search_r1 import SearchR1Config, SearchR1Grammar
from verl.agent.grammar.text import unique_documents
from verl.types import Question, SearchResult, Turn

DONE = " <search_complete>Yes</search_complete>"
TWO_HOP = 0.65
OTHER_WORDS = 0.6  # share of DeepRetrieval's questions in other words than the passage
_END = "<|im_end|>"

Facts = dict[str, dict[str, str]]


class AgentLessons:
    """Draws trajectories of the baselines' protocols.

    Args:
        expert: share that is played well. Otherwise a search agent answers with the first thing it finds.
        rewriting: share of DeepRetrieval's queries that are in the words of the passages; the others keep the
            question's wording.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, expert: float = 1.0, rewriting: float = 1.0
    ) -> None:
        self._maker = LessonMaker(tokenizer, seed)
        self._rng = self._maker.rng
        self._expert = expert
        self._rewriting_share = rewriting
        self._search_r1 = SearchR1Grammar(SearchR1Config(prompt="compact"))
        self._search_o1 = SearchO1Grammar(SearchO1Config(prompt="compact", condense=False))
        self._ircot = IRCoTGrammar(IRCoTConfig(prompt="compact"))
        self._rewriting = DeepRetrievalGrammar(DeepRetrievalConfig(prompt="compact"))

    def any(self) -> Lesson:
        """Draw from all four."""
        return self._rng.choice((self.search_r1, self.search_o1, self.ircot, self.deepretrieval))()

    def search_r1(self) -> Lesson:
        """One Search-R1 trajectory."""
        facts, chain, question = self._case()
        parts: list[tuple[str | list[int], bool]] = [
            (self._maker.chat(self._search_r1.prompt_messages(question)), False)
        ]
        thought = ""
        for subject, relation, value in self._hops(chain):
            parts.append((f"{_think(thought)}<search>{relation} of {subject}</search>", True))
            parts.append((self._search_r1.observation_text(self._maker.retrieved(facts, subject)), False))
            thought = sentence(relation, subject, value)
        parts.append((f"{_think(thought)}<answer>{_last(thought)}</answer>", True))
        return self._maker.trajectory(parts)

    def search_o1(self) -> Lesson:
        """One Search-o1 trajectory that reads the documents as they are."""
        facts, chain, question = self._case()
        parts: list[tuple[str | list[int], bool]] = [
            (self._maker.chat(self._search_o1.prompt_messages(question)), False)
        ]
        thought = ""
        for subject, relation, value in self._hops(chain):
            parts.append((f"{thought}{QUERY_START}{relation} of {subject}{QUERY_END}", True))
            parts.append((self._search_o1.observation_text(self._maker.retrieved(facts, subject)), False))
            thought = sentence(relation, subject, value)
        parts.append((f"{thought}<answer>{_last(thought)}</answer>", True))
        return self._maker.trajectory(parts)

    def ircot(self) -> Lesson:
        """One step of IRCoT: the fact that the documents show, and that it was the last one where it was."""
        facts, chain, question = self._case()
        hops = self._hops(chain)
        at = self._rng.randrange(len(hops))
        steps = [sentence(relation, subject, value) for subject, relation, value in hops]
        turns: list[Turn] = []
        found = self._maker.retrieved(facts, chain.subjects[0])
        question = Question(question.id, question.text, question.answers, question.source, initial_documents=found)
        for step, (_, _, value) in zip(steps[:at], hops[:at], strict=True):
            result = SearchResult(step, self._maker.retrieved(facts, value), ())
            turns.append(Turn((), step, query=step, result=result))
        shown = unique_documents([*found, *(doc for turn in turns if turn.result for doc in turn.result.documents)])
        prompt = self._maker.chat(self._ircot.messages(question, [turn.text for turn in turns], shown))
        reply = steps[at] + (DONE if at == len(hops) - 1 else _END)
        return self._maker.trajectory([(prompt, False), (reply, True)])

    def deepretrieval(self) -> Lesson:
        """One query for the first hop, in the words of the passages or in the question's."""
        chain = self._rng.choice(chains(self._facts())[0])
        (subject,), (relation,) = chain.subjects, chain.relations
        worded = RELATIONS[relation] if self._rng.random() < OTHER_WORDS else relation
        question = Question("", question_text(subject, [worded]), (chain.answer,), "world")
        used = relation if self._rng.random() < self._rewriting_share else worded
        prompt = self._maker.chat(self._rewriting.prompt_messages(question))
        reply = f'<think>{used}</think>\n<answer>{{"query": "{used} of {subject}"}}</answer>'
        return self._maker.trajectory([(prompt, False), (reply, True)])

    def _facts(self) -> Facts:
        return draw_facts(self._rng, self._rng.sample(names(), self._rng.randint(4, 8)))

    def _case(self) -> tuple[Facts, Chain, Question]:
        facts = self._facts()
        one, two = chains(facts)
        chain = self._rng.choice(two if two and self._rng.random() < TWO_HOP else one)
        return facts, chain, self._question(chain)

    def _question(self, chain: Chain) -> Question:
        return Question("", chain.ask(self._rng), (chain.answer,), "world")

    def _hops(self, chain: Chain) -> list[tuple[str, str, str]]:
        """Return (subject, relation, value) of every hop that is played."""
        values = (*chain.subjects[1:], chain.answer)
        hops = list(zip(chain.subjects, chain.relations, values, strict=True))
        return hops if self._rng.random() < self._expert else hops[:1]


def _think(thought: str) -> str:
    return f"<think>{thought}</think>\n" if thought else ""


def _last(thought: str) -> str:
    return thought.rstrip(".").rpartition(" ")[2]
