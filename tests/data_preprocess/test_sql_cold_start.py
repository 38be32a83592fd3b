"""Cold start examples: what the annotator is asked, what is rejected and why, resuming, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_preprocess import sql_cold_start
from data_preprocess.sql_cold_start import ColdStartConfig, Summary, run
from generator_llms.config import GeneratorConfig
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from tests.retrieval.engines.sql_support import make_database
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.errors import DataError, SearchAgentError
from verl.evaluation.collect import RunConfig
from verl.records import write_questions
from verl.rewards.sql_config import SqlConfig
from verl.rewards.sql_text import one_line
from verl.types import Question

GOLD = "SELECT name\nFROM singer -- all\nWHERE name = 'Dé ''x'''"
LINE = "SELECT name FROM singer WHERE name = 'Dé ''x'''"


def question(number: int, sql: str = GOLD) -> Question:
    extra = {"db_id": "toy", "sql": sql, "question": f"Who is {number}?"}
    text = f"Database Schema:\nCREATE TABLE singer (name)\n\nQuestion:\nWho is <think>{number}?"
    return Question(f"spider/train/{number}", text, (sql,), "spider", extra=extra)


def config(
    tmp_path: Path, questions: list[Question], server: FakeServer | None = None, **other: Any
) -> ColdStartConfig:
    make_database(tmp_path / "databases" / "toy.sqlite") if not (tmp_path / "databases").exists() else None
    write_questions(tmp_path / "questions.parquet", questions, "train")
    generator = GeneratorConfig(base_url=server.url, retry_window_s=0.2) if server else GeneratorConfig()
    return ColdStartConfig(
        tmp_path / "questions.parquet",
        tmp_path / "cold_start.jsonl",
        SqlConfig(tmp_path / "databases", timeout_s=20.0, workers=1),
        annotator="llm" if server else "none",
        generator=generator,
        run=RunConfig(concurrency=1),
        **other,
    )


def written(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "cold_start.jsonl").read_text(encoding="utf-8").splitlines()]


async def test_golds_are_explained(tmp_path: Path) -> None:
    script = (
        chat("<think>The table singer has names.</think>"),
        chat("Names are in singer."),  # without tags it is all explanation
    )
    async with FakeServer(*script) as server:
        made = await run(config(tmp_path, [question(0), question(1)], server))
    assert made == Summary(2, {})
    rows = written(tmp_path)
    answer = f"<answer>{json.dumps({'sql': LINE}, ensure_ascii=False)}</answer>"
    assert [row["messages"][1] for row in rows] == [
        {"role": "assistant", "content": f"<think>\nThe table singer has names.\n</think>\n{answer}"},
        {"role": "assistant", "content": f"<think>\nNames are in singer.\n</think>\n{answer}"},
    ]
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task="sql"))
    assert rows[0]["messages"][:1] == grammar.prompt_messages(question(0)), "the prompt that training uses"
    assert grammar.parse(question(0), (), rows[0]["messages"][1]["content"]).answer == LINE
    asked = server.requests[0]["messages"][0]["content"]
    assert asked.endswith(f"Correct SQL statement:\n{LINE}") and "CREATE TABLE singer" in asked
    assert "Who is < think>0?" in asked, "a question opens no tag"


async def test_nobody_is_asked_without_an_annotator(tmp_path: Path) -> None:
    assert await run(config(tmp_path, [question(0)])) == Summary(1, {})
    (row,) = written(tmp_path)
    assert row["messages"][1]["content"] == f"<answer>{json.dumps({'sql': LINE}, ensure_ascii=False)}</answer>"
    assert row["messages"][0]["content"].count("<think>") == 0


async def test_golds_that_fail_are_rejected_before_anybody_is_asked(tmp_path: Path) -> None:
    golds = [
        "SELECT name FROM nowhere",
        "SELEC",
        "DELETE FROM singer",
        "SELECT a FROM empty",
        "SELECT '<answer>'",
        GOLD,
    ]
    async with FakeServer(default=lambda request: chat("Because.")) as server:
        made = await run(config(tmp_path, [question(n, gold) for n, gold in enumerate(golds)], server))
    assert made == Summary(
        1,
        {
            "gold fails: invalid": 1,
            "gold fails: syntax": 1,
            "gold fails: refused": 1,
            "gold returns nothing": 1,
            "example cannot be read back": 1,
        },
    )
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("<think> </think>", "explanation is blank"),
        ("word " * 21, "explanation is too long"),
        ("<think>one</think> and <answer>", ""),
        ("one <answer> two", "explanation holds tags"),
        ("<think>a <think>b</think></think>", "explanation holds tags"),
        ("As the given SQL shows, names matter.", "explanation speaks of a given statement"),
        ("The query was provided.", "explanation speaks of a given statement"),
        ("Names are given in singer.", ""),
    ],
)
async def test_unusable_explanations_are_asked_for_again(tmp_path: Path, said: str, reason: str) -> None:
    async with FakeServer(default=lambda request: chat(said)) as server:
        settings = config(tmp_path, [question(0), question(1, "SELECT 1")], server, max_words=20, draws=2)
        if reason:
            with pytest.raises(DataError, match=f"none of the 2 questions is left .*{reason}.*2"):
                await run(settings)
        else:
            assert (await run(settings)).written == 2
    assert len(server.requests) == (4 if reason else 2)


async def test_another_draw_may_be_usable(tmp_path: Path) -> None:
    async with FakeServer(chat("As the given SQL shows."), chat("cut", finish="length"), chat("Because.")) as server:
        assert await run(config(tmp_path, [question(0)], server)) == Summary(1, {})
    assert len(server.requests) == 3


async def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    questions = [question(0), question(1), question(2, "SELEC"), question(3)]
    async with FakeServer(chat("First."), default=lambda request: Reply(b"no", status=400)) as server:
        settings = config(tmp_path, questions, server)
        with pytest.raises(SearchAgentError, match="2 of 4 questions failed"):
            await run(settings)
        assert not settings.output.exists()
        errors = (tmp_path / "cold_start.errors.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in errors] == ["spider/train/1", "spider/train/3"]
        server.default = lambda request: chat("Later.")
        before = len(server.requests)
        assert await run(settings) == Summary(3, {"gold fails: syntax": 1})
        assert len(server.requests) - before == 2, "what is done is not asked again"
    said = [row["messages"][1]["content"].split("\n")[1] for row in written(tmp_path)]
    assert said == ["First.", "Later.", "Later."]
    assert not (tmp_path / "cold_start.errors.jsonl").exists()


async def test_questions_without_a_gold_are_refused(tmp_path: Path) -> None:
    bare = Question("spider/train/0", "Who?", ("x",), "spider", extra={"db_id": "toy"})
    with pytest.raises(DataError, match=r"no extra\.sql"):
        await run(config(tmp_path, [bare]))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = config(tmp_path, [question(0)])
    flags = [f"questions={settings.questions}", f"output={settings.output}", "annotator=none"]
    assert sql_cold_start.main([*flags, f"sql.databases={tmp_path / 'databases'}"]) == 0
    assert len(written(tmp_path)) == 1
    assert sql_cold_start.main(flags) == 2
    assert "sql" in capsys.readouterr().err
    assert sql_cold_start.main([*flags, f"sql.databases={tmp_path / 'databases'}", "draws=0"]) == 2
    assert "draws=0; expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sql", "line"),
    [
        (GOLD, LINE),
        ("SELECT 'a\n--b'\t/* c\n */ , 1\r\n", "SELECT 'a\n--b' , 1"),
        ("-- all\nSELECT 1", "SELECT 1"),
    ],
)
def test_one_line(sql: str, line: str) -> None:
    assert one_line(sql) == line
