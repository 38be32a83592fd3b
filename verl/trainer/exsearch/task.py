"""What a run is about: its questions, its warm-up, and a retriever; given, or the embedded world built on the spot."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_preprocess import warmup
from data_preprocess.readers.source import SourceConfig
from data_preprocess.warmup import WarmupConfig
from data_preprocess.world import build as world
from data_preprocess.world.build import WorldFiles
from verl.errors import ConfigError, DataError
from verl.evaluation.journal import write_whole
from verl.records import read_questions, write_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.services import free_port, retriever_service, running
from verl.trainer.exsearch.config import SelfTrainConfig, WorldRun
from verl.trainer.stages import Done, Stages
from verl.typed import encode
from verl.types import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A run's inputs, ready.

    Attributes:
        config: the run's configuration with paths and retriever filled in.
        inputs: what identifies questions and warm-up, for the stages that build on them.
    """

    config: SelfTrainConfig
    inputs: Any


@contextmanager
def prepared(config: SelfTrainConfig, stages: Stages) -> Iterator[Task]:
    """Check what is given; or build the world, and serve its index while the block runs.

    Raises:
        ConfigError: something is missing.
    """
    if config.world is None:
        yield Task(_given(config), [_identity(path) for path in (config.train, config.dev, config.test, config.warmup)])
        return
    run, files = config.world, WorldFiles(config.output / "world")
    index, rows = config.output / "index", config.output / "warmup.jsonl"
    built = stages.run("world", run.world, [files.folder], lambda: _build(run, files))
    indexed = stages.run("index", built.fingerprint, [index], lambda: _index(files, index))
    service = retriever_service(
        index, files.corpus, "bm25", config.search.topk, free_port(), config.output / "logs" / "retriever.log"
    )
    with ExitStack() as stack:
        with stages.aside("retriever"):
            stack.enter_context(running(service))
        retriever = replace(config.retriever, url=f"{service.url}/retrieve")
        filled = replace(
            config, train=files.questions("train"), dev=files.questions("validation"), test=files.questions("test")
        )
        filled = replace(filled, retriever=retriever)
        done = _warm_up_rows(filled, run, rows, indexed, stages) if run.warmup else indexed
        yield Task(replace(filled, warmup=rows if run.warmup else None), done.fingerprint)


def _given(config: SelfTrainConfig) -> SelfTrainConfig:
    for name in ("train", "dev"):
        path = getattr(config, name)
        if path is None or not path.is_file():
            raise ConfigError(f"{name}={path}: no such file; give a parquet of questions")
    for name in ("test", "warmup"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise ConfigError(f"{name}={path}: no such file; give one, or leave {name} out")
    return config


def _identity(path: Path | None) -> list[Any] | None:
    """Questions are large; size and time of the file stand for them."""
    return None if path is None else [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def _build(run: WorldRun, files: WorldFiles) -> dict[str, int]:
    world.build(run.world, files.folder)
    return {"documents": len(Corpus.open(files.corpus))}


def _index(files: WorldFiles, index: Path) -> None:
    build_index(Corpus.open(files.corpus), "bm25", index)


def _warm_up_rows(config: SelfTrainConfig, run: WorldRun, rows: Path, before: Done, stages: Stages) -> Done:
    assert config.train is not None
    asked = rows.with_name("warmup_questions.parquet")
    settings = WarmupConfig(
        output=rows,
        source=SourceConfig(path=str(asked), source="world", split="train"),
        decomposition="world",
        search=config.search,
        seed=config.seed,
        retriever=config.retriever,
    )
    # A stage of its own: the rows' journal goes by the file's time, so a build that was cut off needs the same file.
    train, chosen = config.train, [before.fingerprint, run.warmup, run.warmup_two_hop]
    picked = stages.run("warmup_questions", chosen, [asked], lambda: _pick(train, run, asked))
    lasting = [picked.fingerprint, config.search, config.seed, settings.min_overlap]
    return stages.run("warmup_rows", lasting, [rows], lambda: encode(asyncio.run(warmup.build(settings))))


def _pick(train: Path, run: WorldRun, asked: Path) -> int:
    questions = warm_up_questions(read_questions(train), run)
    write_questions(asked, questions, "train")
    return len(questions)


def warm_up_questions(questions: Sequence[Question], run: WorldRun) -> list[Question]:
    """Return the first `run.warmup` questions, of those of two hops at most `run.warmup_two_hop`."""
    two_hop, chosen = 0, []
    for question in questions:
        two_hop += question.kind == "2-hop"
        if question.kind != "2-hop" or run.warmup_two_hop is None or two_hop <= run.warmup_two_hop:
            chosen.append(question)
    return chosen[: run.warmup]


def with_prefix(rows: Path, prefix: str, output: Path) -> Path:
    """Write warm-up rows with `prefix` before each answer (`ScoringConfig.answer_prefix`); return the file to learn.

    Raises:
        DataError: the rows are no jsonl of conversations.
    """
    if not prefix:
        return rows
    lines = []
    for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            last = row["messages"][-1]
        except (ValueError, KeyError, IndexError, TypeError) as cause:
            raise DataError(f"{rows}:{number}: {cause!r}; expected an object with messages") from cause
        if row.get("kind") != "rank" and not last["content"].startswith(prefix):
            last["content"] = prefix + last["content"]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(output, "".join(lines))
    return output
