"""Retrieval collections as questions: BEIR folders, MS MARCO's domains, published parquets, disjoint splits."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preprocess import ir, scifact
from data_preprocess.disjoint import check_disjoint
from data_preprocess.ir import BEIR, IrSet, convert, keys, read_rows
from verl.errors import DataError
from verl.records import read_questions
from verl.rewards.ndcg import Ndcg, judged
from verl.types import Question

SCIFACT = Path(__file__).resolve().parents[3] / "shared/data/scifact"
HEADER = "query-id\tcorpus-id\tscore\n"
Judgements = Sequence[tuple[str, str, int]]


def beir(folder: Path, headers: Mapping[str, bool] | None = None, **splits: Judgements) -> Path:
    """Write a BEIR folder; query q7's text is "claim 7"."""
    (folder / "qrels").mkdir(parents=True)
    ids = dict.fromkeys(query for rows in splits.values() for query, _, _ in rows)
    lines = (json.dumps({"_id": id, "text": f"claim {id.strip('qx')}", "metadata": {}}) + "\n" for id in ids)
    (folder / "queries.jsonl").write_text("".join(lines))
    for split, rows in splits.items():
        head = HEADER if (headers or {}).get(split, True) else ""
        text = head + "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in rows)
        (folder / f"qrels/{split}.tsv").write_text(text)
    return folder


def single(numbers: Iterable[int]) -> Judgements:
    return [(f"q{number}", f"d{number}", 1) for number in numbers]


@pytest.mark.parametrize("name", BEIR)
@pytest.mark.parametrize("dense", [False, True])
def test_a_beir_set(tmp_path: Path, name: str, dense: bool) -> None:
    dev = [("q50", "d1", 2), ("q50", "d2", 0), ("q50", "d3", 1), ("q99", "d9", 0)]
    source = beir(tmp_path / "in", train=single(range(40)), dev=dev, test=[("q100", "d1", 1), ("q100", "d2", 1)])
    made = convert(IrSet(name, dense), source, tmp_path / "out")
    stem = f"{name}_dense" if dense else name
    assert made.splits["test"] == (
        Question(f"{stem}_test/test/q100", "claim 100", ("d1", "d2"), f"{stem}_test", extra={"qid": "q100"}),
    ), "several relevant documents are one row"
    (graded,) = made.splits["validation"]
    assert (graded.source, graded.answers) == (f"{stem}_val", ("d1", "d3"))
    assert list(judged(graded).items()) == [("d1", 2), ("d2", 0), ("d3", 1)], "grades in the order of the judgements"
    assert {question.source for question in made.splits["train"]} == {f"{stem}_train"}
    assert len(made.splits["train"]) == 40
    for split, questions in made.splits.items():
        assert read_questions(tmp_path / f"out/{split}.parquet") == list(questions)
        Ndcg().validate(questions)
    row = pq.read_table(tmp_path / "out/test.parquet").to_pylist()[0]
    assert row["data_source"] == f"{stem}_test" and row["reward_model"]["ground_truth"]["target"] == ["d1", "d2"]
    prompt = row["prompt"][0]["content"]
    assert "claim 100" in prompt and ("matches meaning" in prompt) == dense
    assert (prompt_k := Ndcg().cutoff(f"{stem}_test")) == 10 and prompt_k != Ndcg().cutoff(f"{stem}_train")


@pytest.mark.parametrize("without", [(), ("dev",), ("train", "dev", "test")])
def test_a_header_may_be_missing(tmp_path: Path, without: tuple[str, ...]) -> None:
    headers = {split: split not in without for split in ("train", "dev", "test")}
    source = beir(tmp_path / "in", headers, train=single(range(5)), dev=single([50]), test=single([99]))
    splits = convert(IrSet("fiqa"), source, tmp_path / "out").splits
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [5, 1, 1]


def test_splits_share_nothing_and_validation_is_never_from_test(tmp_path: Path) -> None:
    dev = [*single(range(95, 110)), *single(range(60, 62))]
    source = beir(tmp_path / "in", train=[*single(range(40)), *single([60, 100])], dev=dev, test=single(range(95, 103)))
    made = convert(IrSet("nfcorpus"), source, tmp_path / "out", validation=9)
    check_disjoint(made.splits, keys)
    ids = {split: {question.extra["qid"] for question in found} for split, found in made.splits.items()}
    assert ids["test"] == {f"q{n}" for n in range(95, 103)}
    assert ids["validation"] == {f"q{n}" for n in (*range(103, 110), 60, 61)}
    assert ids["train"] == {f"q{n}" for n in range(40)}
    assert made.dropped == {
        "train questions that test has": 1,
        "validation questions that test has": 8,
        "train questions that validation has, or was drawn from": 1,
    }


def test_questions_of_one_wording_stay_apart_within_test_and_out_of_train(tmp_path: Path) -> None:
    source = beir(
        tmp_path / "in", train=[("x7", "d1", 1), *single(range(10, 30))], test=[("q7", "d1", 1), ("x8", "d", 1)]
    )
    queries = source / "queries.jsonl"
    queries.write_text(queries.read_text() + json.dumps({"_id": "q8", "text": "claim 8"}) + "\n")
    (source / "qrels/test.tsv").write_text(HEADER + "q7\td1\t1\nx8\td\t1\nq8\td2\t1\n")
    splits = convert(IrSet("fever"), source, tmp_path / "out").splits
    assert [question.text for question in splits["test"]] == ["claim 7", "claim 8", "claim 8"]
    assert "claim 7" not in {question.text for question in (*splits["train"], *splits["validation"])}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("domain", ["all", "health", "science", "tech"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_domain_of_msmarco(tmp_path: Path, domain: str, dense: bool) -> None:
    def row(number: int) -> dict[str, Any]:
        return {"question": f"what is {number}", "docs_id": [number, str(number + 1)]}

    write(tmp_path / "in/train.jsonl", map(row, range(30)))
    write(tmp_path / "in/dev.jsonl", map(row, range(25, 40)))
    splits = convert(IrSet("msmarco", dense, domain), tmp_path / "in", tmp_path / "out").splits
    stem = "msmarco_dense" if dense else "msmarco_sparse"
    first = splits["test"][0]
    assert first == Question(f"{stem}_test/dev/0", "what is 25", ("25", "26"), f"{stem}_test", kind=domain)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [23, 2, 15]
    assert {question.source for question in splits["validation"]} == {f"{stem}_val"}
    assert Ndcg().cutoff(f"{stem}_train") == 10 and judged(first) == {"25": 1, "26": 1}


def published(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def templated(source: str, number: int, truth: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    content = "<|im_start|>user\nWrite.\nAssistant: <think>"
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": "literature_mining",
        "reward_model": {"style": "rule", "ground_truth": dict(truth)},
        "extra_info": {"split": source.rpartition("_")[2], "index": number},
        **fields,
    }


def test_published_parquets_of_a_beir_set(tmp_path: Path) -> None:
    def row(number: int, split: str) -> dict[str, Any]:
        target, score = [f"d{number}", f"e{number}"], [1, 2]
        truth = {"target": target, "score": score}
        return templated(
            f"nfcorpus_{split}", number, truth, qid=str(number), query=f"claim {number}", target=target, score=score
        )

    published(tmp_path / "in/train.parquet", [row(n, "train") for n in range(30)])
    # As published, validation is dev and then test.
    published(tmp_path / "in/val.parquet", [row(n, "val") for n in (*range(50, 55), *range(100, 110))])
    published(tmp_path / "in/test.parquet", [row(n, "test") for n in range(100, 110)])
    made = convert(IrSet("nfcorpus"), tmp_path / "in", tmp_path / "out")
    assert {question.text for question in made.splits["validation"]} == {f"claim {n}" for n in range(50, 55)}
    assert made.dropped == {"validation questions that test has": 10}
    first = made.splits["test"][0]
    assert first == Question(
        "nfcorpus_test/test/0",
        "claim 100",
        ("d100", "e100"),
        "nfcorpus_test",
        extra={"qid": "100", "grades": '{"d100": 1, "e100": 2}'},
    )
    for other in (IrSet("nfcorpus", dense=True), IrSet("fever")):
        with pytest.raises(DataError, match=r"data_source is 'nfcorpus_train'; expected (nfcorpus_dense|fever)_train"):
            convert(other, tmp_path / "in", tmp_path / "out2")


def test_published_scifact_rows_of_one_claim_are_one_question(tmp_path: Path) -> None:
    def row(number: int, target: str, split: str) -> dict[str, Any]:
        truth = {"target": target, "score": 1}
        return templated(f"scifact_{split}", number, truth, qid=number, query=f"claim {number}", label=target)

    published(tmp_path / "train.parquet", [row(n, f"d{n}{part}", "train") for n in range(20) for part in "ab"])
    published(tmp_path / "test.parquet", [row(99, "a", "test"), row(98, "c", "test"), row(99, "b", "test")])
    splits = convert(IrSet("scifact"), tmp_path, tmp_path / "out").splits
    assert [question.answers for question in splits["test"]] == [("a", "b"), ("c",)]
    assert len(splits["train"]) + len(splits["validation"]) == 20


@pytest.mark.parametrize(
    "source", ["msmarco_sparse_test", "msmarco_sparse_no_reason_test", "msmarco_sparse_test_no_reason"]
)
def test_published_msmarco_rows_and_those_without_reasoning(tmp_path: Path, source: str) -> None:
    path = tmp_path / "test.parquet"
    published(path, [templated(source, 0, {"target": ["7"]}, input="what is it", label=["7", "7", "8"])])
    (question,) = read_rows(IrSet("msmarco"), path)
    assert (question.text, question.answers, question.extra) == ("what is it", ("7", "8"), {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": " ", "docs_id": [1]}, "question is ' '"),
        ({"question": "q", "docs_id": [None]}, "a target is missing; expected the id of a document"),
        ({"question": "q", "docs_id": [[1]]}, r"a target is \[1\]"),
        ({"question": "q", "docs_id": [True]}, "a target is True"),
        ({"data_source": "msmarco_beir_test", "query": "q", "target": ["1"]}, "expected msmarco_sparse_train"),
        ({"data_source": "msmarco_sparse_test", "target": ["1"]}, "query is missing"),
        ({"data_source": "msmarco_sparse_test", "query": "q", "target": ["1"], "score": [1, 2]}, "1 targets have 2"),
        ({"data_source": "msmarco_sparse_test", "query": "q", "target": ["1"], "score": [0.5]}, "has the score 0.5"),
        ({"question": "first", "docs_id": [2], "score": 1}, ""),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "dev.jsonl", [{"question": "first", "docs_id": [1]}, row])
    if not message:
        assert [question.answers for question in read_rows(IrSet("msmarco"), path)] == [("1", "2")]
        return
    with pytest.raises(DataError, match=message) as caught:
        read_rows(IrSet("msmarco"), path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_two_grades_for_one_document_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    rows = [
        templated("fever_test", 0, {"target": ["a"]}, qid="1", query="q", target=["a"], score=[grade])
        for grade in (1, 2)
    ]
    published(path, rows)
    with pytest.raises(DataError, match="document 'a' has grade 2 here and 1 before"):
        read_rows(IrSet("fever"), path)


def test_a_query_without_a_relevant_document_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "dev.jsonl", [{"question": "a", "docs_id": []}, {"question": "b", "docs_id": [1]}])
    assert [question.text for question in read_rows(IrSet("msmarco"), path)] == ["b"]
    assert "1 of 2 queries have no relevant document" in caplog.text


def test_sources_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither qrels/ nor published parquets"):
        convert(IrSet("fever"), tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        convert(IrSet("msmarco"), tmp_path, tmp_path / "out")
    source = beir(tmp_path / "in", train=single([1]), test=single([2]))
    (source / "qrels/test.tsv").write_text("q3\td1\t1\n")
    with pytest.raises(DataError, match=r"judges 1 queries that .*queries\.jsonl does not hold, the first is 'q3'"):
        convert(IrSet("fever"), source, tmp_path / "out")
    (source / "qrels/test.tsv").unlink()
    with pytest.raises(DataError, match=r"test\.tsv"):
        convert(IrSet("fever"), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").touch()
    with pytest.raises(DataError, match="is not empty"):
        convert(IrSet("fever"), source, tmp_path / "out")
    for wrong in (("trec", False, ""), ("fever", False, "health"), ("msmarco", False, "sport")):
        with pytest.raises(DataError, match="expected one of"):
            IrSet(*wrong)


def test_from_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level(logging.INFO)
    source = beir(tmp_path / "in", train=single(range(20)), test=single(range(90, 95)))
    command = ["--dataset", "hotpotqa", "--dense", "--source", str(source), "--save_dir", str(tmp_path / "out")]
    ir.main(command)
    assert "18 train, 2 validation, 5 test" in caplog.text
    with pytest.raises(SystemExit):
        ir.main(command)
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ir.main([*command, "--validation", "0"])


@pytest.mark.skipif(not SCIFACT.is_dir(), reason="../shared/data/scifact is not there")
def test_scifact_as_it_is_published(tmp_path: Path) -> None:
    (zipped,) = SCIFACT.glob("*.zip")
    scifact.convert(zipped, tmp_path / "beir")
    made = convert(IrSet("scifact"), tmp_path / "beir", tmp_path / "out")
    counts = {split: len(questions) for split, questions in made.splits.items()}
    assert counts["test"] == 300 and counts["validation"] == 80
    assert sum(counts.values()) + sum(made.dropped.values()) - 80 == 809 + 300
    assert max(len(question.answers) for question in made.splits["test"]) > 1
    check_disjoint(made.splits, keys)
