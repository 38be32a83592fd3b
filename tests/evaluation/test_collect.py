"""Collecting contexts: the methods, resuming, the published file, and that no question is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Retriever, question
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.protocols import Generation, Sampling
from verl.errors import ConfigError, DataError, RetrieverError
from verl.evaluation.collect import (
    CollectConfig,
    Context,
    RunConfig,
    collect,
    context_with_info,
    iter_contexts,
    main,
    run,
    write_published,
)
from verl.evaluation.collectors import Collector, Direct, Gathered, NaiveRag, Oracle, Searcher, passages_of
from verl.evaluation.identity import check_tokenizer, model_identity, retriever_identity
from verl.evaluation.journal import Unfinished
from verl.records import write_questions
from verl.retrieval.client import RetrieverClientConfig
from verl.types import Document, Question, SearchResult, Stop, Trajectory
from verl.workers.engines import EngineConfig

PARAMETERS = {"method": "naive_rag", "topk": 2}


class Letters:
    """A tokenizer with one token per character."""

    chat_template = "yes"

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> list[int]:
        return self.encode(conversation[0]["content"])

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        return "".join(map(chr, token_ids))


class Script:
    """An engine that says one line after the other, and remembers the seeds that it was given."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.seeds: list[int | None] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        self.seeds.append(sampling.seed)
        text = self._lines.pop(0)
        return Generation(tuple(map(ord, text)), (0.0,) * len(text), text, "stop", 0)


async def test_naive_rag_searches_for_the_question() -> None:
    gathered = await NaiveRag(Retriever(), 2)(QUESTIONS[0])
    assert gathered.trajectory.documents == (DOCUMENTS[0], DOCUMENTS[1])
    assert gathered.trajectory.searches == 1
    assert gathered.trajectory.stop is Stop.FINISHED
    assert gathered.response == ""


async def test_naive_rag_refuses_a_retriever_that_miscounts() -> None:
    async def nothing(queries: Sequence[str], topk: int) -> list[SearchResult]:
        return []

    with pytest.raises(RetrieverError, match="0 results for 1 query"):
        await NaiveRag(nothing, 2)(QUESTIONS[0])


async def test_the_oracle_finds_gold_passages_in_hop_order_whatever_their_spelling() -> None:
    corpus = [*DOCUMENTS, Document("5", "ann.", "More about Ann.")]
    asked = replace(QUESTIONS[1], gold_titles=("bob", "The Ann", "Nobody", "Bob"))
    gathered = await Oracle(passages_of([asked], corpus))(asked)
    assert [document.id for document in gathered.trajectory.documents] == ["2", "1", "5"]
    assert gathered.trajectory.searches == 0


def test_only_wanted_passages_are_kept() -> None:
    assert passages_of([QUESTIONS[0]], DOCUMENTS) == {"ann": (DOCUMENTS[0],)}


async def test_a_searcher_plays_its_protocol_and_keeps_its_words() -> None:
    engine = Script(
        '<query>{"query": "rival of Bob"}</query>',
        "<important_info>[1]</important_info>\n<search_complete>True</search_complete>",
    )
    asked = replace(QUESTIONS[1], initial_documents=(DOCUMENTS[0],))
    grammar = S3Grammar(S3Config(topk=2, prompt="compact"))
    gathered = await Searcher(grammar, engine, Retriever(), Letters(), Sampling(seed=1))(asked)
    trajectory = gathered.trajectory
    assert [document.title for document in trajectory.documents] == ["Bob", "Ann"]
    assert trajectory.searches == 1
    block = "<information>\nDoc 1(Title: Bob) The rival of Bob is Cid.\nDoc 2(Title: Ann)"
    assert gathered.response.startswith('<query>{"query": "rival of Bob"}</query>\n\n' + block)
    assert gathered.response.endswith("<search_complete>True</search_complete>")


async def test_a_searcher_may_start_from_a_search_for_the_question() -> None:
    retriever = Retriever()
    grammar = S3Grammar(S3Config(topk=2, prompt="compact"))
    engine = Script("<search_complete>True</search_complete>")
    gathered = await Searcher(grammar, engine, retriever, Letters(), Sampling(), initial_k=1)(QUESTIONS[0])
    assert retriever.queries == [QUESTIONS[0].text]
    assert gathered.trajectory.documents == gathered.trajectory.question.initial_documents == DOCUMENTS[:1]


async def test_without_documents_the_generator_is_on_its_own() -> None:
    gathered = await Direct()(QUESTIONS[0])
    assert (gathered.trajectory.documents, gathered.trajectory.searches) == ((), 0)


async def test_a_searchers_seed_depends_on_the_question_alone() -> None:
    grammar = S3Grammar(S3Config(topk=2, prompt="compact"))
    stop = "<search_complete>True</search_complete>"
    engine = Script(stop, stop, stop)
    searcher = Searcher(grammar, engine, Retriever(), Letters(), Sampling(seed=1))
    for asked in (QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]):
        await searcher(asked)
    assert engine.seeds[0] == engine.seeds[2] != engine.seeds[1]


async def test_contexts_are_streamed_with_their_trace_and_published(tmp_path: Path) -> None:
    contexts = await collect(QUESTIONS, NaiveRag(Retriever(), 2), tmp_path, PARAMETERS, "t")
    assert [context.trajectory.question for context in contexts] == QUESTIONS
    assert sorted(iter_contexts(tmp_path), key=lambda c: c.trajectory.question.id) == contexts
    assert contexts[0].trajectory.turns[0].result == (await Retriever()([QUESTIONS[0].text], 2))[0]
    published = json.loads((tmp_path / "toy_output_sequences.json").read_text())
    assert published["Who is the mentor of Ann?"] == {
        "golden_answers": ["Bob"],
        "context_with_info": "Doc 1 (Title: Ann)\nThe mentor of Ann is Bob.\n\n"
        "Doc 2 (Title: Bob)\nThe rival of Bob is Cid.\n\n",
        "response_str": "",
    }
    assert list(published) == [asked.text for asked in QUESTIONS]


async def test_policy_tokens_are_counted(tmp_path: Path) -> None:
    stop = "<search_complete>True</search_complete>"
    searcher = Searcher(S3Grammar(S3Config(topk=2)), Script(stop), Retriever(), Letters(), Sampling())
    (context,) = await collect(QUESTIONS[:1], searcher, tmp_path, {}, "t")
    assert context.tokens == len(stop)
    assert context.seconds > 0


async def test_a_second_run_continues(tmp_path: Path) -> None:
    await collect(QUESTIONS[:2], NaiveRag(Retriever(), 2), tmp_path, PARAMETERS, "t")
    retriever = Retriever()
    contexts = await collect(QUESTIONS, NaiveRag(retriever, 2), tmp_path, PARAMETERS, "t")
    assert retriever.queries == [QUESTIONS[2].text]
    assert [context.trajectory.question for context in contexts] == QUESTIONS
    with pytest.raises(DataError, match=r"topk=2 \(now 3\)"):
        await collect(QUESTIONS, NaiveRag(retriever, 3), tmp_path, {**PARAMETERS, "topk": 3}, "t")


async def test_other_round_0_documents_are_another_question(tmp_path: Path) -> None:
    await collect(QUESTIONS[:1], NaiveRag(Retriever(), 2), tmp_path, PARAMETERS, "t")
    retriever = Retriever()
    changed = [replace(QUESTIONS[0], initial_documents=DOCUMENTS[:1])]
    await collect(changed, NaiveRag(retriever, 2), tmp_path, PARAMETERS, "t")
    assert retriever.queries == [QUESTIONS[0].text]


class FailedTrace:
    """A collector whose trace says that a service failed."""

    async def __call__(self, question: Question) -> Gathered:
        return Gathered(Trajectory(question, (), (), Stop.FAILED, error="EngineError: died"))


@pytest.mark.parametrize(
    ("collector", "cause"),
    [
        (NaiveRag(Retriever(broken={QUESTIONS[1].text}), 2), "RetrieverError: gave no answer"),
        (FailedTrace(), "Unfinished: EngineError: died"),
    ],
)
async def test_every_question_is_in_the_output_or_in_the_error_list(
    tmp_path: Path, collector: Collector, cause: str
) -> None:
    with pytest.raises(Unfinished, match="of 3 questions failed"):
        await collect(QUESTIONS, collector, tmp_path, PARAMETERS, "t")
    kept = {context.trajectory.question.id for context in iter_contexts(tmp_path)}
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert kept | {error["id"] for error in errors} == {asked.id for asked in QUESTIONS}
    assert {error["cause"] for error in errors} == {cause}
    assert not list(tmp_path.glob("*_output_sequences.json"))


def test_questions_worded_alike_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alike = [question(0, "Who?", "a"), question(1, "Who?", "b"), question(0, "Who?", "c", source="other/set")]
    traces = [Trajectory(asked, (), (), Stop.FINISHED) for asked in alike]
    paths = write_published([Context(trace, "", 0, 0.0) for trace in traces], tmp_path)
    assert [path.name for path in paths] == ["toy_output_sequences.json", "other_set_output_sequences.json"]
    assert json.loads(paths[0].read_text())["Who?"]["golden_answers"] == ["b"]
    assert "toy: 1 questions share their wording with another" in caplog.text


def test_no_documents_render_as_nothing() -> None:
    assert context_with_info(()) == ""


def test_a_missing_or_malformed_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no contexts\.jsonl"):
        list(iter_contexts(tmp_path))
    (tmp_path / "contexts.jsonl").write_text('{"parameters": {}}\n{"id": "a"}\n')
    with pytest.raises(DataError, match=r"contexts\.jsonl:2"):
        list(iter_contexts(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=orcle"], "did you mean 'oracle'"),
        (["method=oracle"], "set corpus=PATH"),
        (["method=searcher"], "set engine.model=PATH"),
        (["topk=0"], "topk=0; expected at least 1"),
        (["run.concurrency=0"], "concurrency=0; expected at least 1"),
        (["retreiver.url=x"], "did you mean 'retriever'"),
    ],
)
def test_a_wrong_configuration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    path = tmp_path / "questions.parquet"
    write_questions(path, QUESTIONS, "test")
    assert main([f"questions={path}", f"output={tmp_path / 'out'}", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_the_oracle_runs_from_the_command_line(tmp_path: Path) -> None:
    questions, corpus, output = tmp_path / "q.parquet", tmp_path / "corpus.jsonl", tmp_path / "out"
    write_questions(questions, QUESTIONS, "test")
    corpus.write_text("".join(json.dumps({"id": d.id, "contents": d.contents}) + "\n" for d in DOCUMENTS))
    assert main([f"questions={questions}", f"output={output}", "method=oracle", f"corpus={corpus}", "limit=2"]) == 0
    found = {c.trajectory.question.id: [d.id for d in c.trajectory.documents] for c in iter_contexts(output)}
    assert found == {"toy/test/0": ["1"], "toy/test/1": ["1", "2"]}


def test_a_file_without_questions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path / "q.parquet", [], "test")
    assert main([f"questions={tmp_path / 'q.parquet'}", f"output={tmp_path / 'out'}"]) == 1
    assert "q.parquet holds no question" in capsys.readouterr().err


async def test_a_searcher_without_a_model_is_refused_with_the_fix(tmp_path: Path) -> None:
    async def health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    write_questions(tmp_path / "q.parquet", QUESTIONS, "test")
    async with await asyncio.start_server(health, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/retrieve"
        config = CollectConfig(
            tmp_path / "q.parquet",
            tmp_path / "out",
            "searcher",
            engine=EngineConfig(str(tmp_path / "no model"), kind="hf"),
            retriever=RetrieverClientConfig(url),
        )
        with pytest.raises(ConfigError, match=r"engine.model=.*no model: its tokenizer does not load"):
            await run(config)


def test_a_checkpoint_with_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = Path(__file__).resolve().parents[2] / "data_preprocess" / "world" / "checkpoints" / "searcher"
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    rows = config["vocab_size"]
    check_tokenizer(str(model), rows)
    with pytest.raises(ConfigError, match=rf"its tokenizer has {rows} ids, but the model only 8 embeddings"):
        check_tokenizer(str(tmp_path), rows)
    with pytest.raises(ConfigError, match=r"its config.json does not load"):
        check_tokenizer(str(tmp_path / "none"), rows)


def test_defaults_are_valid() -> None:
    config = CollectConfig(Path("q.parquet"), Path("out"))
    assert config.run == RunConfig(64, 32)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (httpx.Response(200, json={"retriever": "bm25", "fingerprint": "abc"}), "bm25/abc"),
        (httpx.Response(200, json={"status": "ok"}), "http://r:1/retrieve"),
        (httpx.Response(200, text="ok"), "http://r:1/retrieve"),
        (httpx.Response(404, json={"detail": "Not Found"}), "http://r:1/retrieve"),
    ],
)
async def test_a_retriever_is_identified_by_its_index(answer: httpx.Response, expected: str) -> None:
    asked: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return answer

    assert await retriever_identity("http://r:1/retrieve", httpx.MockTransport(handle)) == expected
    assert asked == ["http://r:1/health"]


async def test_a_retriever_that_is_away_is_named() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(RetrieverError, match="no retriever answers at http://r:1/retrieve"):
        await retriever_identity("http://r:1/retrieve", httpx.MockTransport(handle))


def test_a_model_is_identified_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert model_identity(str(tmp_path / "a")) == model_identity(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert model_identity(str(tmp_path / "a")) != model_identity(str(tmp_path / "b"))
    assert model_identity("org/model") == "org/model"
