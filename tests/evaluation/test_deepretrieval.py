"""The whole evaluation of queries: collected folders, failures, the filter against a literature service, and SQL."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from verl.agent.grammar.deepretrieval import DeepRetrievalConfig
from verl.config import CONFIG_DIR, build, compose
from verl.errors import ConfigError, DataError, RetrieverError
from verl.evaluation import deepretrieval
from verl.evaluation.collect import CollectConfig, collect
from verl.evaluation.collect import run as collect_as_configured
from verl.evaluation.collectors import Gathered, raw_query
from verl.evaluation.deepretrieval import QueriesConfig, failures
from verl.evaluation.journal import Unfinished
from verl.evaluation.leaderboard import LeaderboardConfig, write_leaderboard
from verl.evaluation.query_scores import DEPTH
from verl.records import write_questions
from verl.retrieval.engines.demo_records import Record
from verl.retrieval.engines.demo_server import DemoServer
from verl.types import Document, Question, SearchResult, Stop, Trajectory, Turn

ROOT = CONFIG_DIR.parent
LITERATURE = [
    Record("11", "NCT00000011", "Aspirin for pain", "", "2001/01/01"),
    Record("12", "NCT00000012", "Ibuprofen for pain", "", "2001/01/01"),
    Record("13", "NCT00000013", "Statins", "", "2001/01/01"),
]
PICO = "P: pain\nI: aspirin\nC:\nO: relief"
ASKED = [
    Question("pubmed/test/0", PICO, ("11", "12"), "pubmed", extra={"pub_date": "2005/01/01"}),
    Question("pubmed/test/1", "P: statins\nI:\nC:\nO:", ("13",), "pubmed", extra={"pub_date": "2005/01/01"}),
    Question("pubmed/test/2", "P: gout\nI: x\nC: y\nO: z", ("11",), "pubmed", extra={"pub_date": "2005/01/01"}),
]


class Scripted:
    """Searches nothing: what each question's query is, and what it found; None fails."""

    def __init__(self, found: Mapping[str, tuple[str, Sequence[str]] | None]) -> None:
        self.found = found

    async def __call__(self, question: Question) -> Gathered:
        """Return what was written down."""
        entry = self.found[question.id]
        if entry is None:
            raise RetrieverError("the service is away")
        query, ids = entry
        documents = tuple(Document(id, "", "") for id in ids)
        result = SearchResult(query, documents, (1.0,) * len(ids))
        turn = Turn((), query, query=query, finished=True, result=result)
        return Gathered(Trajectory(question, (), (turn,), Stop.FINISHED, documents), query)


def gather(folder: Path, collector: Any, topk: int = 3000, questions: Sequence[Question] = ASKED) -> Path:
    try:
        asyncio.run(collect(questions, collector, folder, {"topk": topk}, "test"))
    except Unfinished:
        assert failures(folder)
    return folder


def scored(**config: Any) -> dict[str, Any]:
    return asyncio.run(deepretrieval.run(build(QueriesConfig, config)))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    found = {ASKED[0].id: ("pain", ["11", "12"]), ASKED[1].id: ("13 OR gout", ["13"]), ASKED[2].id: None}
    return gather(tmp_path / "policy", Scripted(found))


def test_raw_queries_join_the_parts_and_leave_other_questions_alone() -> None:
    queries = [raw_query(question) for question in ASKED]
    assert queries == ["pain OR aspirin OR relief", "statins", "gout OR x OR y OR z"]
    other = Question("nq/test/0", "who: I or you?", ("me",), "nq")
    assert raw_query(other) == other.text


def test_policy_raw_query_and_the_paper_in_one_report(policy: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "test.parquet", ASKED, "test")
    with DemoServer(LITERATURE) as server:
        literature = {"engine": "pubmed", "base_url": server.url}
        own = {"questions": str(tmp_path / "test.parquet"), "output": str(tmp_path / "raw"), "topk": 3000}
        collecting = build(CollectConfig, {**own, "method": "raw_query", "literature": literature})
        asyncio.run(collect_as_configured(collecting))
        report = scored(
            output=str(tmp_path / "report"),
            metric="recall",
            contexts={"deepretrieval": str(policy), "raw_query": str(tmp_path / "raw")},
            questions=str(tmp_path / "test.parquet"),
            against="raw_query",
            setting="pubmed",
            filter="tokens",
            literature=literature,
            max_failed_fraction=0.5,
        )
    ours, raw = report["methods"]["deepretrieval"], report["methods"]["raw_query"]
    assert (ours["n"], ours["failed"], ours["recall"]) == (3, 1, pytest.approx(2 / 3))
    # From left to right: pain OR aspirin finds 11 and 12, statins 13, and nothing is about gout.
    assert (raw["failed"], raw["recall"]) == (0, pytest.approx(2 / 3))
    assert (ours["paper"], raw["paper"]) == (0.6507, 0.1036)
    assert ours["against_baseline"]["difference"] == pytest.approx(0)
    # The policy wrote the number of a record into its second query; "gout" alone finds nothing.
    assert ours["injection"]["injected"] == pytest.approx(1 / 3)
    assert ours["injection"]["scores"]["recall@3000"] == pytest.approx(1 / 3)
    assert (ours["injection"]["before"], ours["injection"]["after"]) == ({"recall@3000": 1.0}, {"recall@3000": 0.0})
    rows = [json.loads(line) for line in (tmp_path / "report/scores/deepretrieval.jsonl").read_text().splitlines()]
    assert [row["failed"] for row in rows] == ["", "", "RetrieverError: the service is away"]
    assert (rows[1]["injected"], rows[1]["filtered"]) == (["13"], "gout")
    published = json.loads((tmp_path / "report/results/eval_results_deepretrieval.json").read_text())
    assert published["average"] == {"recall@3000": pytest.approx(2 / 3)} and published["total"] == 3
    text = (tmp_path / "report" / "report.md").read_text()
    assert "recall@3000" in text and "65.07" in text and "Without the answers" in text


def test_its_report_is_a_row_of_the_leaderboard(policy: Path, tmp_path: Path) -> None:
    perfect = gather(tmp_path / "x", Scripted({q.id: ("q", q.answers) for q in ASKED}))
    contexts = {"deepretrieval": str(policy), "oracle": str(perfect)}
    scored(output=str(tmp_path / "r"), metric="recall", contexts=contexts, max_failed_fraction=1.0)
    board = write_leaderboard(LeaderboardConfig(tmp_path / "board", (tmp_path / "r",), "pubmed"))
    assert list(board) == ["oracle", "deepretrieval"], "the best first, without an accuracy"
    lines = (tmp_path / "board/leaderboard.md").read_text().splitlines()
    line = next(line for line in lines if "deepretrieval" in line)
    assert "66.7" in line and line.rstrip("| ").endswith("65.1")


def test_questions_that_are_in_no_folder_are_failures(policy: Path, tmp_path: Path) -> None:
    more = [*ASKED, Question("pubmed/test/9", "P: a\nI: b\nC: c\nO: d", ("11",), "pubmed")]
    write_questions(tmp_path / "more.parquet", more, "test")
    one = {"output": str(tmp_path / "r"), "metric": "recall", "contexts": {"m": str(policy)}}
    figures = scored(**one, questions=str(tmp_path / "more.parquet"), max_failed_fraction=1.0)["methods"]["m"]
    assert (figures["n"], figures["failed"], figures["recall"]) == (4, 2, 0.5)
    with pytest.raises(RetrieverError, match=r"2 of 4 questions failed.*above max_failed_fraction=0.05"):
        scored(**one, questions=str(tmp_path / "more.parquet"))
    write_questions(tmp_path / "fewer.parquet", ASKED[1:], "test")
    with pytest.raises(DataError, match=r"holds 'pubmed/test/0', which is not in"):
        scored(**one, questions=str(tmp_path / "fewer.parquet"))


def test_contexts_of_too_few_documents_are_refused(tmp_path: Path) -> None:
    folder = gather(tmp_path / "x", Scripted({q.id: ("q", q.answers) for q in ASKED}), topk=12)
    with pytest.raises(DataError, match=r"first 12 documents.*look at 3000; collect again with search.topk=3000"):
        scored(output=str(tmp_path / "r"), metric="recall", contexts={"m": str(folder)})
    assert scored(output=str(tmp_path / "r"), metric="ndcg", contexts={"m": str(folder)})["methods"]["m"]["scores"] == {
        "ndcg@10": 1.0
    }


def test_a_filter_whose_search_fails_is_counted_and_changes_no_other_figure(policy: Path, tmp_path: Path) -> None:
    unreachable = {"engine": "pubmed", "base_url": "http://127.0.0.1:9", "http": {"attempts": 1, "timeout_s": 2.0}}
    figures = scored(
        output=str(tmp_path / "r"),
        metric="recall",
        contexts={"m": str(policy)},
        filter="tokens",
        literature=unreachable,
        max_failed_fraction=1.0,
    )["methods"]["m"]
    assert figures["recall"] == pytest.approx(2 / 3) and figures["failed"] == 1
    assert figures["injection"]["failed"] == 1
    assert figures["injection"]["scores"]["recall@3000"] == pytest.approx(1 / 3)


class Statements:
    """Answers with a statement each; None is an answer that could not be read."""

    def __init__(self, *statements: str | None) -> None:
        self.statements = statements

    async def __call__(self, question: Question) -> Gathered:
        """Answer by the number in the question's id."""
        said = self.statements[int(question.id.rpartition("/")[2])]
        note = "" if said else "<answer> occurs 0 times, expected once"
        turn = Turn((), said or "", answer=said, finished=True, invalid=bool(note), note=note)
        return Gathered(Trajectory(question, (), (turn,), Stop.FINISHED))


def test_execution_accuracy_of_statements(tmp_path: Path) -> None:
    (tmp_path / "database").mkdir()
    with sqlite3.connect(tmp_path / "database" / "shop.sqlite") as connection:
        connection.executescript("CREATE TABLE t (a INT); INSERT INTO t VALUES (1), (2);")
    extra = {"db_id": "shop", "sql": "SELECT a FROM t"}
    asked = [Question(f"spider/test/{n}", "Which?", ("SELECT a FROM t",), "spider_test", extra=extra) for n in range(5)]
    statements = Statements("SELECT a FROM t ORDER BY a DESC", "SELECT 1", "SELECT nope FROM t", None, "DROP TABLE t")
    folder = gather(tmp_path / "x", statements, questions=asked)
    figures = scored(
        output=str(tmp_path / "r"),
        metric="execution",
        contexts={"m": str(folder)},
        sql={"databases": str(tmp_path / "database")},
        execution={"dataset": "spider"},
    )["methods"]["m"]
    assert figures["scores"] == {"execution_accuracy": 0.2, "executed": 0.4}
    assert figures["accuracy"] == figures["macro_accuracy"] == 0.2
    assert (figures["unreadable"], figures["failed"]) == (1, 0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"contexts": {}}, "contexts is empty"),
        ({"against": "n"}, "did you mean 'm'"),
        ({"metric": "execution"}, "set sql.databases"),
        ({"metric": "execution", "sql": {"databases": "d"}, "filter": "tokens"}, "filter=tokens is for queries"),
        ({"max_failed_fraction": 2.0}, "from 0 to 1"),
        ({"concurrency": 0}, "at least 1"),
        ({"metric": "hit"}, "did you mean 'hits'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build(QueriesConfig, {"output": "r", "metric": "recall", "contexts": {"m": "x"}} | wrong)


METRIC_OF = {"literature": "recall", "evidence": "hits", "beir": "ndcg", "dense": "ndcg", "sql": "execution"}


@pytest.mark.parametrize("family", METRIC_OF)
def test_a_setting_asks_for_as_many_documents_as_its_metric_looks_at(family: str) -> None:
    config = compose("collect", [f"setting=deepretrieval_{family}", "questions=q", "output=o"], CollectConfig)
    assert isinstance(config.search, DeepRetrievalConfig)
    depth = DEPTH[METRIC_OF[family]]  # type: ignore[index]
    assert config.search.topk >= depth and (family == "sql" or config.topk == config.search.topk == depth)
    assert (config.literature is not None) == (family == "literature")
    assert (config.sampling.temperature, config.search.reasoning, config.search.prefill) == (0.0, True, True)


@pytest.mark.parametrize(
    ("arguments", "collected", "evaluated"),
    [
        (
            ["ctgov", "raw_query", "limit=3", "--", "filter=tokens"],
            ["setting=deepretrieval_literature", "literature.engine=ctgov", "method=raw_query", "limit=3"],
            ["metric=recall", "literature.engine=ctgov", "setting=ctgov", "filter=tokens"],
        ),
        (
            ["pubmed", "gpt_4o_no_reason", "remote.base_url=http://x/v1"],
            ["method=searcher", "search.reasoning=false", "search.prefill=false", "remote.base_url=http://x/v1"],
            ["setting=pubmed", "contexts.gpt_4o_no_reason=outputs/x/contexts/gpt_4o_no_reason"],
        ),
        (
            ["nq", "deepretrieval"],
            ["setting=deepretrieval_evidence", "questions=data/deepretrieval/nq/test.parquet", "engine.model=MODEL"],
            ["metric=hits"],
        ),
        (
            ["dense/scifact", "deepretrieval"],
            ["setting=deepretrieval_dense", "questions=data/deepretrieval/scifact/test.parquet"],
            ["metric=ndcg"],
        ),
        (
            ["msmarco_dense", "deepretrieval"],
            ["setting=deepretrieval_dense", "questions=data/deepretrieval/msmarco/test.parquet"],
            ["metric=ndcg"],
        ),
        (
            ["bird", "deepretrieval"],
            ["setting=deepretrieval_sql", "questions=data/deepretrieval/bird/test.parquet"],
            ["metric=execution", "execution.dataset=bird", "sql.databases=data/raw/bird"],
        ),
    ],
)
def test_the_script_says_what_each_task_is(
    arguments: list[str], collected: list[str], evaluated: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "checkout"
    (root / "scripts" / "evaluation").mkdir(parents=True)
    for name in ("scripts/env.sh", "scripts/evaluation/deepretrieval.sh"):
        shutil.copy(ROOT / name, root / name)
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s\\t" "$@" >>{tmp_path}/log\necho >>{tmp_path}/log\n')
    python.chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "MODEL": "MODEL", "FOLDER": "outputs/x"}
    script = ["bash", str(root / "scripts/evaluation/deepretrieval.sh"), *arguments]
    subprocess.run(script, env=variables, check=True, timeout=60)
    first, second = [line.split("\t")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert first[:2] == ["-m", "verl.evaluation.collect"] and set(collected) <= set(first)
    assert second[:2] == ["-m", "verl.evaluation.deepretrieval"] and set(evaluated) <= set(second)
    assert ("engine.model=MODEL" in first) == ("raw_query" not in arguments)
