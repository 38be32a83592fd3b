"""The world's names, facts and questions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_preprocess.world.language import NAME_COUNT, RELATIONS, World, names, question_text, sentence
from data_preprocess.world.tokenizer import SPECIAL, TAGS, train_tokenizer
from verl.errors import ConfigError
from verl.retrieval.bm25 import Analyzer
from verl.retrieval.settings import BM25Config

POOL = names()


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train_tokenizer()


def test_there_are_as_many_distinct_names_as_asked_for_and_always_the_same() -> None:
    assert len(POOL) == NAME_COUNT == len({name.lower() for name in POOL})
    assert names(10) == POOL[:10]
    with pytest.raises(ValueError, match="exceeds the"):
        names(10_000)


def test_every_name_and_relation_is_one_token_wherever_it_stands(tokenizer: object) -> None:
    def tokens(text: str) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        return [tokenizer.decode([i]) for i in ids]  # type: ignore[attr-defined]

    for name in POOL:
        assert f" {name}" in tokens(sentence("mentor", name, "X")), name
        assert f" {name}" in tokens(f"Doc 3(Title: {name}) The"), name
        assert f" {name}" in tokens(f'{{"query": "heir of {name}"}}'), name
        assert f" {name}" in tokens(question_text(name, ["teacher", "enemy"])), name
    for word in (*RELATIONS, *RELATIONS.values()):
        assert f" {word}" in tokens(f"Who is the {word} of the {word} of X?"), word
    for tag in (*TAGS, *SPECIAL):
        assert tokens(f"a{tag}b") == ["a", tag, "b"]


def test_the_stemmer_leaves_names_alone_and_keeps_passage_and_question_words_apart() -> None:
    analyze = Analyzer(BM25Config())
    assert [analyze(name) for name in POOL] == [[name.lower()] for name in POOL]
    stems = [analyze(word) for word in (*RELATIONS, *RELATIONS.values())]
    assert all(len(stem) == 1 for stem in stems)
    assert len({stem[0] for stem in stems}) == 2 * len(RELATIONS)
    assert not {stem[0] for stem in stems} & {name.lower() for name in POOL}


def test_a_question_names_the_chain_from_its_end() -> None:
    assert question_text("Bana", ["heir"]) == "Who is the heir of Bana?"
    assert question_text("Bana", ["heir", "mentor"]) == "Who is the mentor of the heir of Bana?"


@given(seed=st.integers(0, 10_000), entities=st.integers(2, 30))
@settings(max_examples=30)
def test_a_world_is_closed_and_follows_from_its_seed(seed: int, entities: int) -> None:
    inhabitants = POOL[:entities]
    world = World.generate(seed, inhabitants)
    assert world == World.generate(seed, inhabitants)
    assert list(world.facts) == list(inhabitants)
    for subject, about in world.facts.items():
        assert set(about) <= set(RELATIONS)
        assert len(about) == min(3, entities - 1) == len(set(about.values()))
        assert subject not in about.values()
        assert set(about.values()) <= set(inhabitants)


def test_other_seeds_have_other_facts() -> None:
    assert World.generate(1, POOL[:50]) != World.generate(2, POOL[:50])
    with pytest.raises(ValueError, match="at least 2 entities"):
        World.generate(1, POOL[:1])


def test_a_passage_states_every_fact_of_its_subject() -> None:
    world = World({"Bana": {"heir": "Dovo", "ally": "Kima"}, "Dovo": {}, "Kima": {}})
    passage = world.passage("Bana")
    assert (passage.id, passage.title) == ("bana", "Bana")
    assert passage.text == "The heir of Bana is Dovo. The ally of Bana is Kima."
    assert [document.title for document in world.passages()] == ["Bana", "Dovo", "Kima"]


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.25, 0.6, 1.0]))
@settings(max_examples=20)
def test_questions_are_distinct_answerable_and_hide_their_bridge(seed: int, share: float) -> None:
    world = World.generate(seed, POOL[:40])
    questions = world.questions("world", "test", 80, seed, two_hop=share)
    assert questions == world.questions("world", "test", 80, seed, two_hop=share)
    assert Counter(question.kind for question in questions)["2-hop"] == round(80 * share)
    assert [question.id for question in questions] == [f"world/test/{n}" for n in range(80)]
    assert len({question.text for question in questions}) == 80
    for question in questions:
        words = question.text.removesuffix("?").split()
        relations = [word for word in words if word in RELATIONS][::-1]
        subject = words[-1]
        hops = [subject]
        for relation in relations:
            hops.append(world.facts[hops[-1]][relation])
        assert question.answers == (hops[-1],)
        assert question.gold_titles == tuple(hops[:-1])
        assert question.kind == f"{len(relations)}-hop"
        assert [name for name in POOL if name in words] == [subject], "the bridge and the answer must be found"
        assert hops[-1] != subject


def test_a_world_that_is_too_small_for_the_questions_says_so() -> None:
    world = World.generate(0, POOL[:10])
    with pytest.raises(ConfigError, match=r"asked for 40 1-hop and 60 2-hop .* holds 30 and .*ask for fewer"):
        world.questions("world", "train", 100, 0)
