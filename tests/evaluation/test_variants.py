"""Contexts put together differently: s3's ablations by hand, and that none changes what is already right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.agent.fakes import EOS, CharTokenizer, DictSearch, ScriptedEngine, docs, question
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.loop import run
from verl.agent.protocols import Sampling
from verl.errors import DataError
from verl.evaluation.variants import ablated, cut
from verl.types import Stop, Trajectory

SEARCH = {"a": docs("a1", "a2", "a3"), "b": docs("b1", "a2")}


async def play(*script: str) -> Trajectory:
    grammar = S3Grammar(S3Config(topk=3))
    asked = question(docs("r1", "r2"))
    return await run(asked, grammar, ScriptedEngine(*script), DictSearch(SEARCH), CharTokenizer(), Sampling())


def search(query: str, selected: str = "") -> str:
    return f'{selected}<query>{{"query": "{query}"}}</query>'


DONE = "<search_complete>True</search_complete>"


async def test_the_ablations_by_hand() -> None:
    chosen = "<important_info>[3, 1]</important_info>"
    trajectory = await play(search("a"), search("b", chosen), DONE)
    assert trajectory.documents == docs("a1", "a3", "r1", "r2", "b1", "a2"), "selected first, then unselected blocks"
    assert ablated(trajectory, "no_selection") == docs("r1", "r2", "a1", "a2", "a3", "b1")
    assert ablated(trajectory, "no_round_0") == docs("a1", "a3", "b1", "a2")
    assert ablated(trajectory, "neither") == docs("a1", "a2", "a3", "b1")


async def test_a_selection_from_round_0_is_left_out_with_it() -> None:
    trajectory = await play(search("b", "<important_info>[2]</important_info>"), DONE)
    assert trajectory.documents == docs("r2", "b1", "a2")
    assert ablated(trajectory, "no_round_0") == docs("b1", "a2")


async def test_without_a_search_only_round_0_is_left() -> None:
    trajectory = await play(DONE)
    assert ablated(trajectory, "no_selection") == docs("r1", "r2") and ablated(trajectory, "neither") == ()
    assert (await play(f"nothing{EOS}", DONE)).stop is Stop.FINISHED


async def test_contexts_without_a_trace_cannot_be_ablated() -> None:
    with pytest.raises(DataError, match="has no trace of turns"):
        ablated(replace(await play(DONE), turns=()), "no_selection")


def test_documents_are_cut_whole() -> None:
    assert cut(docs("a", "b", "c"), 2) == docs("a", "b") and cut(docs("a"), None) == docs("a")
