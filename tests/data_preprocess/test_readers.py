"""Every published format becomes the same questions, whatever kind of file it lies in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess.readers import hub
from data_preprocess.readers.files import read_file
from data_preprocess.readers.hub import HubName, parse_name
from data_preprocess.readers.mirage import option_line, retrieval_query, with_options
from data_preprocess.readers.registry import FORMATS, recognise
from data_preprocess.readers.source import Item, SourceConfig, locate, read_source
from generator_llms.options import chosen_option
from verl.errors import ConfigError, DataError
from verl.records import write_questions
from verl.types import Document, Question

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

FLASHRAG = {
    "id": "test_0",
    "question": "where is the mill",
    "golden_answers": ["in the north", "north", "north"],
    "metadata": {"type": "comparison", "supporting_facts": {"title": ["Mill", "Mill"], "sent_id": [0, 2]}},
}
HOTPOT = {
    "_id": "5a8b",
    "question": "Who runs the mill?",
    "answer": "Ada",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Mill", 0], ["Ada", 1]],
    "context": [["Ada", ["Ada was born.", " She runs a mill."]], ["Mill", ["A mill."]], ["Rye", ["A town."]]],
}
HUB_HOTPOT = {
    **HOTPOT,
    "supporting_facts": {"title": ["Mill", "Ada"], "sent_id": [0, 1]},
    "context": {
        "title": ["Ada", "Mill", "Rye"],
        "sentences": [["Ada was born.", " She runs a mill."], ["A mill."], ["A town."]],
    },
}
TWO_WIKI = {**HOTPOT, "type": "compositional", "evidences": [["Mill", "keeper", "Ada"]]}
MUSIQUE = {
    "id": "2hop__17_4",
    "question": "Where was the mill's keeper born?",
    "answer": "Rye",
    "answer_aliases": ["the town of Rye"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Ada", "paragraph_text": "Ada was born in Rye.", "is_supporting": True},
        {"idx": 1, "title": "Moor", "paragraph_text": "A moor.", "is_supporting": False},
        {"idx": 2, "title": "Mill", "paragraph_text": "Ada keeps the mill.", "is_supporting": True},
    ],
    "question_decomposition": [
        {"id": 1, "question": "keeper?", "answer": "Ada", "paragraph_support_idx": 2},
        {"id": 2, "question": "born?", "answer": "Rye", "paragraph_support_idx": 0},
    ],
}
NQ_OPEN = {"question": "who keeps the mill", "answer": ["Ada", "Ada Brook"]}
NQ_ORACLE = {
    "question": "who keeps the mill",
    "answers": ["Ada"],
    "ctxs": [{"title": "Rye", "text": "A town."}, {"title": "Mill", "text": "Ada keeps it.", "isgold": True}],
}
SQUAD_ROW = {
    "id": "56b",
    "title": "North_Mill",
    "context": "Ada keeps it.",
    "question": "Who keeps it?",
    "answers": {"text": ["Ada", "Ada", "ada"], "answer_start": [0, 0, 0]},
}
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "North_Mill",
            "paragraphs": [
                {
                    "context": "Ada keeps it.",
                    "qas": [
                        {"id": "56b", "question": "Who keeps it?", "answers": [{"text": "Ada", "answer_start": 0}]},
                        {
                            "id": "56c",
                            "question": "What does she do?",
                            "answers": [{"text": "keeps", "answer_start": 4}],
                        },
                    ],
                }
            ],
        }
    ],
}
STRATEGY = {
    "qid": "e00",
    "question": "Is the mill older than Ada?",
    "answer": False,
    "evidence": [[["no_evidence"]], [[["Mill, North-12"], "operation"], [["Ada-1"]]], [[["Other-1"]]]],
}
PUBMEDQA = {
    "216": {
        "QUESTION": "Do mills help?",
        "CONTEXTS": ["We asked.", "They do."],
        "final_decision": "maybe",
        "LONG_ANSWER": "Perhaps.",
    }
}
MIRAGE = {
    "medqa": {"0000": {"question": "Which drug?", "options": {"A": "one", "B": 'two\n"'}, "answer": "B"}},
    "pubmedqa": {"17": {"question": "Does it?", "options": {"A": "yes", "B": "no"}, "answer": "A"}},
}


def items(tmp_path: Path, *rows: Any, name: str = "set", **config: Any) -> list[Item]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_source(name, SourceConfig(path=str(path), split="test", **config)))


def one(tmp_path: Path, row: Mapping[str, Any], **config: Any) -> tuple[Question, Item]:
    (item,) = items(tmp_path, row, **config)
    assert item.question is not None, item.fault
    return item.question, item


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("flashrag", FLASHRAG),
        ("hotpotqa", HOTPOT),
        ("hotpotqa", HUB_HOTPOT),
        ("2wikimultihopqa", TWO_WIKI),
        ("musique", MUSIQUE),
        ("nq_open", NQ_OPEN),
        ("nq_open", NQ_ORACLE),
        ("squad", SQUAD),
        ("squad", SQUAD_ROW),
        ("strategyqa", STRATEGY),
        ("pubmedqa", PUBMEDQA),
        ("mirage", MIRAGE),
        ("passages", {"title": "Mill", "text": "A mill."}),
        ("passages", {"id": "1", "contents": '"Mill"\nA mill.'}),
        ("passages", {"Mill-1": {"title": "Mill", "content": "A mill."}}),
        ("published", {"data_source": "nq", "question": "q", "golden_answers": ["a"]}),
    ],
)
def test_a_row_of_each_format_is_recognised(name: str, row: Mapping[str, Any]) -> None:
    assert recognise([{}, row]) is FORMATS[name]


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.text() | st.lists(st.text()), max_size=4))
def test_any_object_is_recognised_as_something_or_nothing(row: dict[str, Any]) -> None:
    assert recognise([row]) is None or recognise([row]).name in FORMATS


@pytest.mark.parametrize(
    "row",
    [FLASHRAG, HOTPOT, HUB_HOTPOT, TWO_WIKI, MUSIQUE, NQ_ORACLE, SQUAD_ROW, STRATEGY],
    ids=lambda row: str(row)[:30],
)
def test_a_row_with_any_field_spoilt_is_read_or_refused_with_a_reason(row: dict[str, Any]) -> None:
    format = recognise([row])
    assert format is not None
    leaves: list[Any] = [None, True, 7, "x", "", [], {}]
    values = [
        *leaves,
        *([leaf] for leaf in leaves),
        *({"title": leaf} for leaf in leaves),
        *([[leaf]] for leaf in leaves),
    ]
    refused = 0
    for key in row:
        for value in [*values, *({"title": ["T"], "sentences": leaf} for leaf in leaves)]:
            try:
                entry = format.read({**row, key: value})
            except ValueError as reason:
                refused += bool(str(reason))
            else:
                assert entry.question and entry.answers and all(answer.strip() for answer in entry.answers)
    assert refused


def test_flashrag(tmp_path: Path) -> None:
    question, item = one(tmp_path, FLASHRAG, source="nq")
    assert question == Question(
        "nq/test/test_0", "where is the mill?", ("in the north", "north"), "nq", ("Mill",), kind="comparison"
    )
    assert item.documents == ()
    with_paragraphs = {**FLASHRAG, "id": "3hop1__1", "metadata": {"paragraphs": MUSIQUE["paragraphs"]}}
    question, item = one(tmp_path, with_paragraphs)
    assert (question.kind, question.gold_titles, item.gold) == ("3-hop", ("Ada", "Mill"), ("0", "2"))


@pytest.mark.parametrize("row", [HOTPOT, HUB_HOTPOT])
def test_hotpotqa_in_both_forms(tmp_path: Path, row: dict[str, Any]) -> None:
    question, item = one(tmp_path, row)
    assert question == Question("set/test/5a8b", "Who runs the mill?", ("Ada",), "set", ("Mill", "Ada"), kind="bridge")
    assert item.documents == (
        Document("0", "Ada", "Ada was born. She runs a mill."),
        Document("1", "Mill", "A mill."),
        Document("2", "Rye", "A town."),
    )
    assert item.gold == ("0", "1")


def test_a_missing_context_leaves_the_gold_titles(tmp_path: Path) -> None:
    question, item = one(tmp_path, {**TWO_WIKI, "context": None})
    assert (question.gold_titles, question.kind, item.documents) == (("Mill", "Ada"), "compositional", ())


def test_musique_gives_the_hops_in_order(tmp_path: Path) -> None:
    question, item = one(tmp_path, MUSIQUE)
    assert question.answers == ("Rye", "the town of Rye")
    assert (question.kind, question.gold_titles) == ("2-hop", ("Mill", "Ada"))
    assert item.gold == ("2", "0")
    assert [document.id for document in item.documents] == ["0", "1", "2"]
    assert "answerable" in items(tmp_path, {**MUSIQUE, "answerable": False})[0].fault


def test_nq_open_with_and_without_passages(tmp_path: Path) -> None:
    question, _ = one(tmp_path, NQ_OPEN)
    assert question == Question("set/test/0", "who keeps the mill?", ("Ada", "Ada Brook"), "set")
    question, item = one(tmp_path, NQ_ORACLE)
    assert (question.gold_titles, item.gold, len(item.documents)) == (("Mill",), ("1",), 2)


def test_squad_file_and_rows(tmp_path: Path) -> None:
    from_file = items(tmp_path, SQUAD)
    assert [item.question.id for item in from_file if item.question] == ["set/test/56b", "set/test/56c"]
    # One paragraph, whichever of its questions ships it.
    assert from_file[0].documents == from_file[1].documents
    assert from_file[0].documents[0].title == "North Mill"
    row, item = one(tmp_path, SQUAD_ROW)
    assert row.answers == ("Ada", "ada") and item.gold == from_file[0].gold
    assert "article 'North_Mill', paragraph 0" in from_file[0].place


def test_strategyqa_takes_the_first_annotator_with_evidence(tmp_path: Path) -> None:
    question, item = one(tmp_path, STRATEGY)
    assert (question.answers, question.gold_titles) == (("no",), ("Mill, North", "Ada"))
    assert item.gold == ("Mill, North-12", "Ada-1")


def test_pubmedqa_and_its_official_test_ids(tmp_path: Path) -> None:
    question, item = one(tmp_path, PUBMEDQA)
    assert (question.id, question.answers, question.gold_titles) == ("set/test/216", ("maybe",), ("PubMed 216",))
    assert item.documents[0].text == "We asked. They do."
    ids = tmp_path / "ids.json"
    ids.write_text('{"17": "yes"}')
    assert items(tmp_path, PUBMEDQA, keep_ids=ids) == []
    ids.write_text("216\n17\n")
    assert len(items(tmp_path, PUBMEDQA, keep_ids=ids)) == 1
    ids.write_text("[[1]]")
    with pytest.raises(DataError, match="expected ids"):
        items(tmp_path, PUBMEDQA, keep_ids=ids)


def test_mirage_keeps_the_options_for_the_model_and_from_the_retriever(tmp_path: Path) -> None:
    first, second = (item.question for item in items(tmp_path, MIRAGE))
    assert first is not None and second is not None
    assert first == Question(
        "medqa/test/0000",
        'Which drug?\nOptions:\nA: one\nB: two "',
        ('B: two "',),
        "medqa",
        extra={"query": "Which drug?"},
    )
    assert (second.id, second.answers) == ("pubmedqa/test/17", ("A: yes",))
    assert retrieval_query(first) == "Which drug?"
    (only,) = items(tmp_path, MIRAGE, subsets=("pubmedqa",))
    assert only.question == second


@given(
    st.text(min_size=1).filter(lambda text: text.strip()),
    st.dictionaries(st.sampled_from("ABCDE"), st.text(), min_size=1).map(
        lambda d: dict(zip("ABCDE", d.values(), strict=False))
    ),
)
def test_a_published_question_gives_its_query_back(asked: str, options: dict[str, str]) -> None:
    # A published parquet has the text alone.
    question = Question("m/test/0", with_options(asked, options), ("x",), "m")
    assert retrieval_query(question) == asked
    assert all(
        chosen_option(question.text, letter) == option_line(letter, text)
        for letter, text in options.items()
        if text.split()
    )


@pytest.mark.parametrize("text", ["Which?", "Options:\nA: one", "Why?\nOptions:\n", "Why?\nOptions:\nas you like"])
def test_a_text_without_options_is_its_own_query(text: str) -> None:
    assert retrieval_query(Question("q/test/0", text, ("x",), "q")) == text


def test_the_published_parquet_keeps_sources_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "published.parquet"
    rows = [
        {
            "id": "train_0",
            "data_source": "nq",
            "question": "who?",
            "golden_answers": ["Ada"],
            "reward_model": {"style": "rule", "ground_truth": {"question": "who?", "target": "Ada"}},
            "extra_info": {"split": "train", "index": 0},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (item,) = read_source("nq_hotpotqa", SourceConfig(path=str(path), split="train"))
    assert item.question == Question("nq/train_0", "who?", ("Ada",), "nq")
    own = Question("a/train/0", "no mark", ("x",), "a", ("T",), kind="k", extra={"query": "q"})
    write_questions(path, [own], "train")
    (item,) = read_source("a", SourceConfig(path=str(path), split="train"))
    assert item.question == own


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"golden_answers": []}, "golden_answers is []; expected at least one answer"),
        ({"golden_answers": ["", " "]}, "expected at least one answer that is not blank"),
        ({"golden_answers": None}, "golden_answers is missing; expected a string or a list of strings"),
        ({"golden_answers": [["Ada"]]}, "which holds ['Ada'] (list); expected a string or a list of strings"),
        ({"golden_answers": [1871]}, "which holds 1871 (int)"),
        ({"golden_answers": ["Ada", None]}, "which holds None (NoneType)"),
        ({"question": " "}, "question is ' '; expected a text"),
        ({"metadata": "none"}, "metadata is a str"),
        ({"question": "\ud800"}, "unpaired surrogate"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_why(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    bad = items(tmp_path, FLASHRAG, {**FLASHRAG, **change})[1]
    assert bad.question is None and fault in bad.fault
    assert bad.place == f"{tmp_path / 'rows.jsonl'}:2"


def test_a_list_where_a_set_gives_one_answer_is_a_fault(tmp_path: Path) -> None:
    assert "gives one answer" in items(tmp_path, {**HOTPOT, "answer": ["Ada"]}, format="hotpotqa")[0].fault


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("zipped", [False, True])
def test_lists_objects_and_lines_hold_the_same_rows(tmp_path: Path, indent: int | None, zipped: bool) -> None:
    rows = [{"question": f"q{n}", "answer": ["a" * 70_000]} for n in range(40)]  # beyond one chunk
    texts = {
        "list": json.dumps(rows, indent=indent),
        "lines": "\n".join(json.dumps(row) for row in rows),
        "bom": "\ufeff" + json.dumps(rows, indent=indent),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
        assert [located.row for located in read_file(path)] == rows
    path = tmp_path / "object.json"
    path.write_text(json.dumps(SQUAD, indent=indent))
    assert [located.row for located in read_file(path)] == [SQUAD]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False) | st.text(max_size=5), max_size=3)))
def test_any_json_list_of_objects_is_streamed(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("list") / "list.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert [located.row for located in read_file(path)] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "item 2: broken JSON list"),
        ('[{"a": 1} {"b": 2}]', "item 2: broken JSON list"),
        ('[{"a": 1}] x', "item 2: broken JSON list (found 'x' after"),
        ("[", "item 1: broken"),
        ("question,answer", "starts with b'question"),
        ("  ", "is empty"),
    ],
)
def test_a_broken_file_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_file(path))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_bad_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q"\n{"question": "q", "answer": ["a"]}\n[1]\n')
    located = list(read_file(path))
    assert [bool(each.reason) for each in located] == [True, False, True]
    assert located[2].place.endswith(":3") and "no JSON object" in located[2].reason


def test_a_gzip_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps([FLASHRAG] * 500).encode())[:-20])
    with pytest.raises(DataError, match="broken gzip"):
        list(read_file(path))


def test_unknown_formats_and_sets_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'hotpotqa'"):
        SourceConfig(format="hotpot_qa")
    with pytest.raises(ConfigError, match="unknown data set 'tirviaqa' and no path; did you mean 'triviaqa'"):
        locate("tirviaqa", SourceConfig(split="test"))
    with pytest.raises(ConfigError, match="popqa has no split train; it has test"):
        locate("popqa", SourceConfig(split="train"))
    with pytest.raises(ConfigError, match=r"sources.nq.split is missing; expected train, validation or test"):
        locate("nq", SourceConfig())
    with pytest.raises(DataError, match="of no known format"):
        items(tmp_path, {"prompt": "hello"})
    assert locate("hotpotqa", SourceConfig(split="test")) == "hf:RUC-NLPIR/FlashRAG_datasets:hotpotqa:dev"


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text(json.dumps(FLASHRAG))
    config = SourceConfig(path=str(tmp_path), split="validation")
    assert locate("nq", config) == str(tmp_path / "dev.jsonl")
    with pytest.raises(DataError, match=r"has no split test \(test.jsonl, .json or .parquet\); found dev.jsonl"):
        locate("nq", SourceConfig(path=str(tmp_path), split="test"))


def test_names_on_the_hub() -> None:
    assert parse_name("hf:o/n") == HubName("o/n")
    assert parse_name("hf:o/n:nq:dev") == HubName("o/n", "nq", "dev")
    assert parse_name("hf:o/n::dev") == HubName("o/n", None, "dev")
    with pytest.raises(ConfigError, match="expected hf:OWNER/NAME"):
        parse_name("hf:o/n:a:b:c")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two configs and their splits, as the hub keeps them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "qa"
    cards = []
    for name in ("nq", "hotpotqa"):
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev"):
            rows = [{**FLASHRAG, "id": f"{split}_{n}", "question": f"{name} {n}"} for n in range(3)]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = "\n".join(f"  - split: {split}\n    path: {name}/{split}.jsonl" for split in ("train", "dev"))
        cards.append(f"- config_name: {name}\n  data_files:\n{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(cards) + "\n---\n")
    return folder


def test_a_set_of_the_hubs_form(hub_folder: Path) -> None:
    pytest.importorskip("datasets")
    config = SourceConfig(path=f"{hub.PREFIX}{hub_folder}:hotpotqa", split="validation")
    found = list(read_source("hotpotqa", config))
    assert [item.question.text for item in found if item.question] == [f"hotpotqa {n}?" for n in range(3)]
    assert found[0].question and found[0].question.id == "hotpotqa/validation/dev_0"
    assert found[0].question.gold_titles == ("Mill",)
    with pytest.raises(DataError, match="has no split test; it has train, dev"):
        list(read_source("nq", SourceConfig(path=f"{hub.PREFIX}{hub_folder}:nq", split="test")))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_source("nq", SourceConfig(path=f"{hub.PREFIX}{hub_folder}:nothing", split="train")))


@pytest.mark.parametrize(
    ("path", "questions", "format"),
    [
        ("hotpotqa/rpt_dev.jsonl", 300, "hotpotqa"),
        ("2wikimultihopqa/migres_train500.json", 500, "2wikimultihopqa"),
        ("2wikimultihopqa/migres_dev200.jsonl", 200, "2wikimultihopqa"),
        ("squad/squad_v1.1_dev_partA.json", 4961, "squad"),
        ("nq_open_oracle/nq-open-oracle.jsonl.gz", 2655, "nq_open"),
        ("strategyqa/migres_dev229.jsonl", 229, "strategyqa"),
        ("pubmedqa/ori_pqal.json", 1000, "pubmedqa"),
        ("mirage/benchmark.json.gz", 7663, "mirage"),
    ],
)
def test_the_real_sets_are_read_whole(path: str, questions: int, format: str) -> None:
    if not (SHARED / path).is_file():
        pytest.skip(f"{path} is not here")
    found = list(read_source("real", SourceConfig(path=str(SHARED / path), split="test")))
    assert [item.fault for item in found if item.fault] == []
    asked = [item.question for item in found if item.question]
    assert len(asked) == len({question.id for question in asked}) == questions
    assert recognise([located.row for located in read_file(SHARED / path) if located.row][:1]) is FORMATS[format]
    if format != "mirage":
        assert all(question.gold_titles for question in asked)
