"""DeepRetrieval's literature and evidence questions: raw and published files, disjoint splits, dates."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess import search_engine
from data_preprocess.disjoint import check_disjoint, separate
from data_preprocess.search_engine import convert, keys, read_rows
from tests.retrieval.engines.literature_server import LiteratureServer
from verl.errors import DataError
from verl.records import read_questions
from verl.retrieval.engines.demo_records import records, search
from verl.retrieval.engines.literature import LiteratureConfig, open_literature
from verl.types import Question

Rows = Sequence[Mapping[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def review(number: int, **other: Any) -> dict[str, Any]:
    return {
        "pico": {"P": f"adults {number}", "I": "aspirin\nor none", "C": "", "O": "pain"},
        "publication_pmids": [str(1000 + number), 2000 + number],
        "pub_date": "2015/03/01",
        "origin": {"pmid": 500 + number},
        **other,
    }


def asked(number: int, **other: Any) -> dict[str, Any]:
    return {"question": f"Who wrote book {number}?", "answers": [f"Author {number}", f"A. {number}"], **other}


def test_pubmed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = [review(number) for number in range(100, 105)]
    shared = [review(900, origin={"pmid": 502}), review(901, pico=test[1]["pico"], origin={})]
    empty = review(902, publication_pmids=[])
    undated = review(903, pub_date=None)
    train = [review(number) for number in range(50)]
    write(tmp_path / "raw/train.jsonl", [*train, *shared, empty, undated])
    write(tmp_path / "raw/test.jsonl", [*test, review(2, origin={"pmid": 777})])
    made = convert("pubmed", tmp_path / "raw", tmp_path / "out", validation=3)
    read = {name: read_questions(tmp_path / f"out/{name}.parquet") for name in ("train", "validation", "test")}
    assert {name: tuple(questions) for name, questions in read.items()} == made.splits
    assert read["test"][0] == Question(
        "pubmed/test/0",
        "P: adults 100\nI: aspirin or none\nC:\nO: pain",
        ("1100", "2100"),
        "pubmed",
        extra={"pub_date": "2015/03/01", "review": "600"},
    )
    assert [len(read[name]) for name in ("train", "validation", "test")] == [48, 3, 6]
    # Of train's 53 with a target, two are worded as test questions are (rows 2 and 51).
    assert made.dropped == {
        "train questions that test has": 2,
        "train questions that validation has, or was drawn from": 3,
    }
    ids = {question.id for questions in read.values() for question in questions}
    assert not {"pubmed/train/2", "pubmed/train/51", "pubmed/train/52"} & ids, "as in test, and without a target"
    rows = pq.read_table(tmp_path / "out/test.parquet").to_pylist()
    assert (
        "P: adults 100" in rows[0]["prompt"][0]["content"] and "systematic reviews" in rows[0]["prompt"][0]["content"]
    )
    assert rows[0]["reward_model"]["ground_truth"]["target"] == ["1100", "2100"]
    assert "1 of 54 rows are without a target" in caplog.text
    assert "1 of 54 rows are without a publication date, so nothing limits their search" in caplog.text


def test_what_comes_from_one_review_stays_together(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [review(number, origin={"pmid": number // 10}) for number in range(60)])
    write(tmp_path / "test.jsonl", [review(99, origin={"pmid": 3}), review(98)])
    made = convert("pubmed", tmp_path, tmp_path / "out", validation=1)
    assert {question.extra["review"] for question in made.splits["train"]} | {
        question.extra["review"] for question in made.splits["validation"]
    } == {"0", "1", "2", "4", "5"}
    assert (len(made.splits["validation"]), len(made.splits["train"])) == (1, 40)


def test_ctgov(tmp_path: Path) -> None:
    def trial(number: int) -> dict[str, Any]:
        return {"pico": review(number)["pico"], "trial_nctids": [f"NCT{number:08}", f"nct{number:08}"]}

    write(tmp_path / "train.jsonl", [trial(number) for number in range(30)])
    write(tmp_path / "test.jsonl", [trial(99)])
    made = convert("ctgov", tmp_path, tmp_path / "out")
    (question,) = made.splits["test"]
    assert (question.source, question.answers, question.extra) == ("ctgov", ("NCT00000099",), {})
    assert (len(made.splits["train"]), len(made.splits["validation"])) == (27, 3), "a tenth at most"


@pytest.mark.parametrize("name", ["nq_serini", "triviaqa", "squad"])
def test_evidence_questions(tmp_path: Path, name: str) -> None:
    write(
        tmp_path / "train.jsonl", [*map(asked, range(20)), asked(100), {**asked(200), "question": "WHO wrote Book 200"}]
    )
    write(tmp_path / "dev.jsonl", [*map(asked, range(200, 210)), asked(101)])
    write(tmp_path / "test.jsonl", map(asked, range(100, 103)))  # type: ignore[arg-type]
    made = convert(name, tmp_path, tmp_path / "out")
    assert [question.text for question in made.splits["test"]] == [f"Who wrote book {n}?" for n in (100, 101, 102)]
    assert made.splits["test"][0].answers == ("Author 100", "A. 100")
    assert {question.id for question in made.splits["validation"]} == {f"{name}/dev/{number}" for number in range(10)}
    assert {question.id for question in made.splits["train"]} == {f"{name}/train/{number}" for number in range(20)}
    assert made.dropped == {
        "train questions that test has": 1,
        "validation questions that test has": 1,
        "train questions that validation has, or was drawn from": 1,
    }


def test_splits_go_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [asked(number) for number in range(100)])
    write(tmp_path / "test.jsonl", [asked(1000)])
    made = [convert("squad", tmp_path, tmp_path / f"out{n}", 5, seed).splits for n, seed in enumerate((1, 1, 2))]
    assert (
        made[0] == made[1] and made[0]["validation"] != made[2]["validation"] and made[0]["train"] != made[2]["train"]
    )
    assert made[0]["train"] != tuple(sorted(made[0]["train"], key=lambda question: question.id)), "shuffled"


def published(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def templated(source: str, number: int, split: str, **fields: Any) -> dict[str, Any]:
    content = f"<|im_start|>system\nReason first.<|im_end|>\n<|im_start|>user\n{fields['input']}\nAssistant: <think>"
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": "literature_mining",
        "reward_model": {"style": "rule", "ground_truth": {"target": fields["label"]}},
        "extra_info": {"split": split, "index": number},
        **fields,
    }


def test_the_published_parquets_are_read(tmp_path: Path) -> None:
    def row(number: int, split: str) -> dict[str, Any]:
        text = f"P: adults {number}\nI: aspirin\nC: placebo\nO: pain\n"
        return templated("pubmed_32", number, split, input=text, label=[str(number + 1)], pub_date="2015/03/01")

    published(tmp_path / "in/train.parquet", [row(number, "train") for number in range(40)])
    published(tmp_path / "in/test.parquet", [row(number, "test") for number in range(100, 103)])
    published(tmp_path / "in/test_full.parquet", [row(number, "test") for number in range(103, 110)])
    made = convert("pubmed", tmp_path / "in", tmp_path / "out")
    first = made.splits["test"][0]
    assert first == Question(
        "pubmed_32/test/0",
        "P: adults 100\nI: aspirin\nC: placebo\nO: pain",
        ("101",),
        "pubmed_32",
        extra={"pub_date": "2015/03/01"},
    )
    assert [question.id for question in made.splits["test"][3:5]] == ["pubmed_32/test_full/0", "pubmed_32/test_full/1"]
    assert (len(made.splits["train"]), len(made.splits["validation"])) == (36, 4)
    assert read_questions(tmp_path / "out/test.parquet") == list(made.splits["test"])


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("pubmed", ["pubmed", "pubmed_32", "pmd_no_reason"]),
        ("ctgov", ["ctgov", "ctgov_32"]),
        ("nq_serini", ["nq_serini", "nq_serini_no_reason"]),
        ("triviaqa", ["triviaqa", "triviaqa_no_reason"]),
        ("squad", ["squad", "squad_no_reason"]),
    ],
)
def test_every_published_name_is_known(tmp_path: Path, name: str, sources: list[str]) -> None:
    text, label = ("P: x", "NCT00000001" if name == "ctgov" else "1") if name in ("pubmed", "ctgov") else ("Who?", "A")
    rows = [templated(source, 0, "test", input=text, label=[label]) for source in sources]
    published(tmp_path / "test.parquet", rows)
    assert [question.source for question in read_rows(name, tmp_path / "test.parquet")] == sources


def test_published_evidence_questions_and_validation_out_of_test(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        return templated("squad_no_reason", number, "", input=f"Who wrote {number}?", label=["A", "B"])

    published(tmp_path / "train.parquet", [row(number) for number in range(40)])
    published(tmp_path / "test.parquet", [row(number) for number in range(100, 110)])
    published(tmp_path / "val.parquet", [row(number) for number in range(100, 105)])
    with pytest.raises(DataError, match=r"nothing is left of validation; .* test has them all"):
        convert("squad", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "val.parquet").unlink()
    made = convert("squad", tmp_path, tmp_path / "out")
    assert made.splits["test"][0].answers == ("A", "B") and len(made.splits["validation"]) == 4


def test_a_label_may_be_missing_beside_its_target(tmp_path: Path) -> None:
    row = templated("nq_serini", 0, "test", input="Who?", label=["A"])
    path = tmp_path / "test.parquet"
    published(path, [{key: value for key, value in row.items() if key != "label"}])
    assert read_rows("nq_serini", path)[0].answers == ("A",)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("pubmed", review(1, pico=None), "research question is missing; expected its P, I, C and O"),
        ("pubmed", review(1, pico={"P": " ", "I": None}), "expected its P, I, C and O"),
        ("pubmed", review(1, pico=[1]), "expected its P, I, C and O"),
        ("pubmed", review(1, publication_pmids=["12", "PMC34"]), "the target 'PMC34' is no id of this set"),
        ("pubmed", review(1, publication_pmids="['12', '34']"), "is no id of this set"),
        ("pubmed", review(1, publication_pmids={"1": 2}), "expected a list of ids"),
        ("pubmed", review(1, pub_date="soon"), "pub_date is 'soon'; expected a date"),
        ("pubmed", review(1, pub_date="2015/02/30"), "no day of the calendar"),
        ("ctgov", {"pico": {"P": "x"}, "trial_nctids": ["NCT12"]}, "'NCT12' is no id"),
        ("pubmed", {"data_source": "ctgov", "input": "P: x", "label": ["1"]}, "expected pubmed or pmd, for pubmed"),
        ("squad", {"question": " ", "answers": ["a"]}, "question is ' '; expected a text"),
        ("squad", {"question": "Who?", "answers": 5}, "answers is 5"),
        ("squad", {"data_source": "squad", "label": ["a"]}, "input is missing"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    good = {"pubmed": review(0), "ctgov": {"pico": {"P": "x"}, "trial_nctids": ["NCT00000001"]}, "squad": asked(0)}
    path = write(tmp_path / "train.jsonl", [good[name], row])
    with pytest.raises(DataError, match=message) as caught:
        read_rows(name, path)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("found", [[], [""], None])
def test_a_row_without_targets_is_left_out(tmp_path: Path, found: object) -> None:
    path = write(tmp_path / "a.jsonl", [review(1, publication_pmids=found), review(2)])
    assert [question.id for question in read_rows("pubmed", path)] == ["pubmed/a/1"]


def test_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train\.jsonl, nor as \.parquet"):
        convert("pubmed", tmp_path, tmp_path / "out")
    write(tmp_path / "train.jsonl", [review(1)])
    with pytest.raises(DataError, match=r"has no test\.jsonl or test_full\.jsonl"):
        convert("pubmed", tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").touch()
    with pytest.raises(DataError, match="is not empty"):
        convert("pubmed", tmp_path, tmp_path / "out")
    (tmp_path / "train.jsonl").write_text("{broken\n{}\n")
    with pytest.raises(DataError, match="not JSON"):
        read_rows("pubmed", tmp_path / "train.jsonl")


def question(number: int, text: str = "", place: str = "") -> Question:
    return Question(f"x/train/{number}", text or f"q{number}", ("a",), "x", extra={"review": place} if place else {})


def test_the_check_finds_what_is_shared() -> None:
    splits = {"train": [question(1)], "validation": [question(2)], "test": [question(3, "The Q1!")]}
    with pytest.raises(DataError, match="train question 'x/train/1' and test question 'x/train/3' share 'text:q1'"):
        check_disjoint(splits)
    with pytest.raises(DataError, match="nothing is left of train"):
        check_disjoint({"train": []})
    places = {"train": [question(1, place="7")], "test": [question(2, place="7")]}
    check_disjoint(places)
    with pytest.raises(DataError, match="share 'review:7'"):
        check_disjoint(places, keys)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=8),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_splits_never_share_anything(
    train: list[tuple[int, int]], given_: list[tuple[int, int]], test: list[tuple[int, int]], count: int
) -> None:
    def made(pairs: Sequence[tuple[int, int]], start: int) -> list[Question]:
        return [question(start + n, f"q{text}", str(place)) for n, (text, place) in enumerate(pairs)]

    splits = {"train": made(train, 0), "validation": made(given_, 100), "test": made(test, 200)}
    try:
        separated = separate(splits, count, seed=0, keys=keys)
    except DataError as cause:
        assert "nothing is left" in str(cause)  # noqa: PT017
        return
    found = separated.splits
    assert found["test"] == tuple(splits["test"]) and 1 <= len(found["validation"]) <= count
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not {q.text for q in found[one]} & {q.text for q in found[other]}
        assert not {q.extra["review"] for q in found[one]} & {q.extra["review"] for q in found[other]}
    # Nothing goes without a reason.
    held = {key for name in ("validation", "test") for q in found[name] for key in keys(q)}
    assert {q.id for q in splits["train"] if held.isdisjoint(keys(q))} == {q.id for q in found["train"]}


def test_from_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "train.jsonl", [asked(number) for number in range(20)])
    write(tmp_path / "test.jsonl", [asked(99), asked(0)])
    command = ["--dataset", "squad", "--source", str(tmp_path), "--save_dir", str(tmp_path / "out")]
    search_engine.main(command)
    assert "left out 1 train questions that test has" in caplog.text
    assert "18 train, 1 validation, 2 test" in caplog.text
    with pytest.raises(SystemExit, match="1"):
        search_engine.main(command)
    with pytest.raises(SystemExit, match="2"):
        search_engine.main([*command, "--validation", "0"])
    assert "is not empty" in capsys.readouterr().err


async def test_a_question_is_what_engine_and_reward_expect(tmp_path: Path) -> None:
    query = "asthma AND aspirin"
    limited = search(query, records(), "2001/02/03")
    row = review(1, publication_pmids=[record.pmid for record in limited] * 2, pub_date="2001 Feb 3")
    (question,) = read_rows("pubmed", write(tmp_path / "a.jsonl", [row]))
    with LiteratureServer() as server:
        async with open_literature(LiteratureConfig(base_url=server.url), {}) as literature:
            (result,) = await literature.bound(question)([query], 3000)
    assert 0 < len(limited) < len(search(query, records()))
    assert question.answers == tuple(document.id for document in result.documents)
