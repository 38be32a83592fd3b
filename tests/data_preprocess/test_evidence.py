"""Supporting facts and steps out of rows: each published set, the embedded world, ROUGE-L, the annotator's replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess.evidence.annotate import MALFORMED, annotate, read_reply
from data_preprocess.evidence.decompose import NO_FACTS, NO_SENTENCE, NO_STEPS, UNREACHABLE, Plan, decompose, world_plan
from data_preprocess.evidence.facts import Fact, facts_of
from data_preprocess.evidence.rouge import rouge_l, words
from data_preprocess.readers.source import Item, SourceConfig, read_source
from data_preprocess.world.language import World, names, sentence
from verl.agent.grammar.base import Message
from verl.types import Document, Question

UP = {"title": "Up (film)", "sentences": ["Up is a film.", "It was directed by Pete Docter."]}
DOCTER = {"title": "Pete Docter", "sentences": ["Docter was born in Bloomington."]}
CONTEXT = {
    "title": [UP["title"], "Other", DOCTER["title"]],
    "sentences": [UP["sentences"], ["x."], DOCTER["sentences"]],
}
HOTPOT = {
    "id": "1",
    "question": "Where was the director of Up born?",
    "answer": "Bloomington",
    "supporting_facts": {"title": ["Pete Docter", "Up (film)"], "sent_id": [0, 1]},
    "context": CONTEXT,
}
UP_FACT, DOCTER_FACT = Fact("Up (film)", "It was directed by Pete Docter."), Fact("Pete Docter", DOCTER["sentences"][0])


def item_of(row: dict[str, Any], folder: Path) -> Item:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (item,) = read_source("set", SourceConfig(path=str(path), split="train"))
    assert item.question is not None, item.fault
    return item


def plan_of(row: dict[str, Any], folder: Path, passages: dict[str, Document] | None = None) -> Plan:
    return decompose(item_of(row, folder), passages or {})


def searches(plan: Plan) -> list[tuple[str, tuple[Fact, ...]]]:
    """Each hop's first query and its facts."""
    return [(hop.queries[0], hop.facts) for hop in plan.hops]


def test_hotpotqa_goes_from_the_page_that_the_question_names(tmp_path: Path) -> None:
    plan = plan_of(HOTPOT, tmp_path)
    assert searches(plan) == [("Up", (UP_FACT,)), ("Pete Docter", (DOCTER_FACT,))]
    assert plan.hops[0].queries == ("Up", "Up (film)", HOTPOT["question"])


def test_hotpotqa_opens_with_the_question_where_it_names_no_page(tmp_path: Path) -> None:
    plan = plan_of({**HOTPOT, "question": "Where was the director born?"}, tmp_path)
    assert searches(plan) == [("Where was the director born?", (UP_FACT,)), ("Pete Docter", (DOCTER_FACT,))]


def test_a_step_whose_name_nobody_said_is_refused(tmp_path: Path) -> None:
    row = {
        **HOTPOT,
        "supporting_facts": [["Up (film)", 0], ["Pete Docter", 0]],
        "context": list(zip(CONTEXT["title"], CONTEXT["sentences"], strict=True)),
    }
    assert plan_of(row, tmp_path).reason == UNREACHABLE, "the sentence about Up does not name its director"


@pytest.mark.parametrize("facts", [{"title": [], "sent_id": []}, {"title": ["Up (film)"], "sent_id": [9]}])
def test_a_row_without_supporting_facts_is_refused(facts: dict[str, list[Any]], tmp_path: Path) -> None:
    assert plan_of({**HOTPOT, "supporting_facts": facts}, tmp_path).reason == NO_FACTS


def test_two_wiki_asks_for_the_relation_of_each_triple(tmp_path: Path) -> None:
    row = {**HOTPOT, "evidences": [["Up", "director", "Pete Docter"], ["Pete Docter", "place of birth", "Bloomington"]]}
    expected = [("director of Up", (UP_FACT,)), ("place of birth of Pete Docter", (DOCTER_FACT,))]
    assert searches(plan_of(row, tmp_path)) == expected
    by_columns = {
        "fact": ["Up", "Pete Docter"],
        "relation": ["director", "place of birth"],
        "entity": ["Pete Docter", "B"],
    }
    assert searches(plan_of({**row, "evidences": by_columns}, tmp_path)) == expected
    assert plan_of({**row, "evidences": [["Brave", "director", "x"]]}, tmp_path).reason == NO_SENTENCE
    assert plan_of({**row, "evidences": row["evidences"][::-1]}, tmp_path).reason == UNREACHABLE
    assert plan_of({**row, "evidences": []}, tmp_path).reason == NO_STEPS


def test_musique_fills_earlier_answers_in(tmp_path: Path) -> None:
    row = {
        "id": "2hop__1_2",
        "question": HOTPOT["question"],
        "answer": "Bloomington",
        "paragraphs": [
            {"idx": 4, "title": "Pete Docter", "paragraph_text": "He makes films. Docter was born in Bloomington."},
            {"idx": 7, "title": "Up (film)", "paragraph_text": "Up is a film. It was directed by Pete Docter. It won."},
        ],
        "question_decomposition": [
            {"question": "Up >> director", "answer": "Pete Docter", "paragraph_support_idx": 7},
            {"question": "where was #1 born?", "answer": "Bloomington", "paragraph_support_idx": 4},
        ],
    }
    assert searches(plan_of(row, tmp_path)) == [
        ("director of Up", (UP_FACT,)),
        ("where was Pete Docter born?", (DOCTER_FACT,)),
    ]


def test_strategyqa_takes_the_steps_that_have_a_paragraph(tmp_path: Path) -> None:
    row = {
        "qid": "1",
        "question": "Is the language of Vincent rooted in English?",
        "answer": True,
        "decomposition": ["What is the language of Vincent?", "Is #1 based in English?", "Is #2 yes?"],
        "evidence": [["no_evidence", ["operation"]], [[["Vincent-1"]], [["Creole-2"], "operation"], ["operation"]]],
    }
    passages = {
        "Vincent-1": Document("Vincent-1", "Vincent", "It is an island. Its language is Creole."),
        "Creole-2": Document("Creole-2", "Creole", "Creole is based on English. It is old."),
    }
    assert searches(plan_of(row, tmp_path, passages)) == [
        ("What is the language of Vincent?", (Fact("Vincent", "Its language is Creole."),)),
        ("Is the language of Vincent based in English?", (Fact("Creole", "Creole is based on English."),)),
    ]
    assert plan_of(row, tmp_path).reason == NO_FACTS, "its file of passages was not given"


def test_the_worlds_questions_spell_their_chains_out() -> None:
    world = World.generate(0, names(20))
    for question in world.questions("world", "train", 30, 0):
        plan = world_plan(question)
        assert len(plan.hops) == int(question.kind[0])
        for hop, subject in zip(plan.hops, question.gold_titles, strict=True):
            (fact,) = hop.facts
            relation = hop.queries[0].removesuffix(f" of {subject}")
            assert fact == Fact(subject, sentence(relation, subject, world.facts[subject][relation])), "it is true"
        assert plan.hops[-1].facts[0].sentence.endswith(f" {question.answers[0]}.")


def test_the_worlds_questions_in_other_words_are_searched_in_those_of_the_passages() -> None:
    asked = Question("q", "Who is the enemy of the teacher of Ann?", ("Cid",), "world", gold_titles=("Ann", "Bob"))
    assert [hop.queries for hop in world_plan(asked).hops] == [("mentor of Ann",), ("rival of Bob",)]
    assert world_plan(Question("q", "Who?", ("x",), "nq")).reason == NO_FACTS
    assert world_plan(Question("q", "Who?", ("x",), "nq", gold_titles=("Ann",))).reason == NO_STEPS


def test_rouge_l_by_hand() -> None:
    score = rouge_l("The cat sat on it", "the dog sat, then it left")
    assert (score.recall, score.precision) == (3 / 5, 3 / 6)  # the ... sat ... it
    assert score.f == pytest.approx(2 * 0.6 * 0.5 / 1.1)
    assert rouge_l("", "a").f == rouge_l("a", "!").f == 0.0


def _lcs(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The textbook recurrence."""
    table = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, one in enumerate(ours, 1):
        for j, other in enumerate(theirs, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@given(st.text("abc ", max_size=40), st.text("abc ", max_size=40))
def test_rouge_l_is_the_longest_common_subsequence(one: str, other: str) -> None:
    ours, theirs = words(one), words(other)
    if ours and theirs:
        assert rouge_l(one, other).recall * len(ours) == pytest.approx(_lcs(ours, theirs))


GOOD = (
    "<Search 1> Who directed Up?\n<Reference 1> [2]\n\n<Search 2> Where was he born?\n<Reference 2> [1], [2]\n<Final>"
)


def test_the_annotators_lines_become_searches() -> None:
    hops = read_reply(GOOD, (DOCTER_FACT, UP_FACT))
    assert [(hop.queries, hop.facts) for hop in hops] == [
        (("Who directed Up?",), (UP_FACT,)),
        (("Where was he born?",), (DOCTER_FACT, UP_FACT)),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "<Final>",
        GOOD.removesuffix("<Final>"),
        GOOD.replace("[2]\n\n", "[3]\n\n"),
        GOOD.replace("[2]\n\n", "[0]\n\n"),
        GOOD.replace("[2]\n\n", "see 2\n\n"),
        GOOD.replace("[2]\n\n", "[]\n\n"),
        GOOD.replace("<Search 2>", "<Search 3>"),
        GOOD.replace("<Reference 1>", "<Search 1>"),
        GOOD.replace("Who directed Up?", ""),
        f"Sure!\n{GOOD}",
    ],
)
def test_any_other_reply_is_not_read(reply: str) -> None:
    assert read_reply(reply, (DOCTER_FACT, UP_FACT)) == ()


@given(
    st.lists(st.sampled_from(["<Search 1> q", "<Reference 1> [1]", "<Search 2> q", "[2]", "<Final>", "\n", " "])).map(
        "\n".join
    )
    | st.text(max_size=60)
)
def test_reading_a_reply_is_total(reply: str) -> None:
    assert all(hop.queries[0] and hop.facts for hop in read_reply(reply, (UP_FACT,)))


async def test_the_annotator_is_asked_again_a_bounded_number_of_times() -> None:
    asked = Question("q", HOTPOT["question"], ("Bloomington",), "hotpotqa")
    replies = ["nothing", GOOD]
    tries: list[int] = []

    async def ask(messages: Sequence[Message], attempt: int) -> str:
        tries.append(attempt)
        assert "[2] (Up (film)) It was directed" in messages[0]["content"]
        return replies[attempt % 2]

    facts = (DOCTER_FACT, UP_FACT)
    assert len((await annotate(asked, facts, ask, 2)).hops) == 2 and tries == [0, 1]
    assert (await annotate(asked, facts, ask, 1)).reason == MALFORMED
    assert (await annotate(asked, (), ask, 5)).reason == NO_FACTS and len(tries) == 3


def test_real_rows_have_facts() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    sources = {
        "hotpotqa": SourceConfig(path=str(folder / "hotpotqa/rpt_dev.jsonl")),
        "2wiki": SourceConfig(path=str(folder / "2wikimultihopqa/migres_train500.json")),
    }
    for name, source in sources.items():
        items = list(read_source(name, source, limit=60))
        facts = [facts_of(item, {}) for item in items]
        # HotpotQA names some sentences that its pages do not have.
        assert sum(len(found) >= 2 for found in facts) >= 57, name
        planned = sum(not decompose(item, {}).reason for item in items)
        assert planned >= 36, f"{name}: {planned} of 60"
