"""One warm-up trajectory: planned searches, really retrieved, in the words of the ExSearch protocol.

The conversation is put together by the grammar that a trained policy plays under, so that both have one layout: every
search is sent to the retriever, what it finds is shown as it would be shown then, and a fact is recorded only if it
stands in a shown passage. A question for which that fails is rejected, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_preprocess.evidence.decompose import Hop, Plan
from data_preprocess.evidence.facts import Fact
from data_preprocess.evidence.rouge import rouge_l
from verl.agent.grammar.base import Message
from verl.agent.grammar.exsearch import ExSearchGrammar
from verl.agent.grammar.exsearch_prompt import RECORD, STOP, THINK
from verl.agent.grammar.render import one_line
from verl.agent.protocols import Search
from verl.types import Document, Question, Turn

TOO_LONG = "more searches than max_turns"
NOT_FOUND = "the evidence is not among the retrieved passages"
NOT_SHOWN = "the evidence is retrieved, but not shown"


@dataclass(frozen=True, slots=True)
class Built:
    """A trajectory, or why there is none (`reason`; `detail` says where).

    Attributes:
        messages: the conversation in the published layout.
        ranks: the choices of documents, each a conversation of one turn; empty without `select`.
        documents: ids of the passage to which each recorded fact was mapped.
    """

    messages: tuple[Message, ...] = ()
    ranks: tuple[tuple[Message, ...], ...] = ()
    documents: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a search did not turn its evidence up."""

    reason: str


@dataclass(frozen=True, slots=True)
class Builder:
    """Turns plans into trajectories.

    Attributes:
        min_overlap: share of a fact's words that a passage must hold in order (ROUGE-L recall) to count as holding it.
            The passage itself is the one of highest ROUGE-L F, as published, which alone would accept any.
    """

    grammar: ExSearchGrammar
    search: Search
    min_overlap: float = 0.5

    async def __call__(self, question: Question, plan: Plan) -> Built:
        """Play the plan.

        Raises:
            RetrieverError: the retriever did not answer; nothing is known of the question then.
        """
        if plan.reason:
            return Built(reason=plan.reason)
        if len(plan.hops) > self.grammar.config.max_turns:
            return Built(reason=TOO_LONG, detail=f"{len(plan.hops)} searches")
        turns: list[Turn] = []
        mapped: list[str] = []
        recorded = ""
        for hop in plan.hops:
            searched = await self._searched(question, turns, recorded, hop)
            if isinstance(searched, Missing):
                return Built(reason=searched.reason, detail=hop.queries[0])
            taken, documents = searched
            turns += taken
            mapped += [document.id for document in documents]
            recorded = f"{RECORD} " + " ".join(one_line(fact.sentence) for fact in hop.facts)
        for text in (f"{recorded}\n{STOP}", one_line(question.answers[0])):
            turns.append(self._said(question, turns, text))
        messages = self.grammar.to_messages(question, turns)
        ranks = self.grammar.rank_messages(turns) if self.grammar.config.select else []
        return Built(tuple(messages), tuple(map(tuple, ranks)), tuple(mapped))

    async def _searched(
        self, question: Question, turns: Sequence[Turn], recorded: str, hop: Hop
    ) -> tuple[list[Turn], list[Document]] | Missing:
        """Ask until the evidence is shown; return the turns of the search and each fact's passage."""
        config = self.grammar.config
        missing = Missing(NOT_FOUND)
        for query in hop.queries:
            text = f"{THINK} {one_line(query)}"
            turn = self._said(question, turns, f"{recorded}\n{text}" if recorded else text)
            assert turn.query is not None  # it was written just now
            (result,) = await self.search([turn.query], config.topk)
            places = [self._holder(fact, result.documents) for fact in hop.facts]
            found = [place for place in places if place is not None]
            if len(found) < len(places):
                continue
            chosen = list(dict.fromkeys(found))
            if len(chosen) > config.shown or (not config.select and max(chosen) >= config.shown):
                missing = Missing(NOT_SHOWN)
                continue
            taken = [replace(turn, result=result)]
            if config.select:
                choice = " > ".join(f"[{place + 1}]" for place in chosen)
                taken.append(self._said(question, [*turns, *taken], choice))
            return taken, [result.documents[place] for place in found]
        return missing

    def _holder(self, fact: Fact, documents: Sequence[Document]) -> int | None:
        """Return the place of the passage that is closest to a fact; None if it does not hold it."""
        scores = [rouge_l(fact.sentence, f"{document.title} {document.text}") for document in documents]
        best = max(range(len(scores)), key=lambda place: scores[place].f, default=None)
        return best if best is not None and scores[best].recall >= self.min_overlap else None

    def _said(self, question: Question, turns: Sequence[Turn], text: str) -> Turn:
        """Return a turn of the policy as the agent loop would, by reading it with the grammar."""
        action = self.grammar.parse(question, turns, text)
        assert not action.invalid, f"the grammar refuses a turn of ours: {text!r}"
        return Turn((), text, action.query, action.selected, action.finished, answer=action.answer)
