"""Work on many questions that survives being killed: every finished one is a line of a file, at once.

A journal is a jsonl file. Its first line states the parameters of the work, every other line is the record of one
finished item under its `key`. Opened again with the same parameters it knows what is done; a last line that a kill cut
short is dropped. Records stay in the file, so memory does not grow with them.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from verl.errors import DataError, EngineError, GeneratorError, RetrieverError, SearchAgentError
from verl.typed import encode
from verl.types import Question

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def fingerprint(value: Any) -> str:
    """Return a digest of anything that `verl.typed.encode` turns into JSON; equal values, equal digests."""
    text = json.dumps(encode(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def question_key(question: Question) -> str:
    """Return the key of a question's record: its id, and a digest of all that a method may see of it."""
    return f"{question.id}#{fingerprint(replace(question, baseline=None))[:8]}"


class Journal:
    """An append-only jsonl of finished records, locked by the process that has it open; use as a context manager.

    Args:
        parameters: everything, besides the item itself, that a record depends on.

    Raises:
        DataError: the file was written with other parameters, is malformed, or is open in another process.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Any]) -> None:
        self.path = path
        self._parameters = encode(dict(parameters))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._offsets: dict[str, int] = {}
        try:
            self._lock()
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, key: str) -> Record:
        """Read the record of a finished item; KeyError if there is none."""
        self._file.seek(self._offsets[key])
        return json.loads(self._file.readline())

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a newly finished item; it survives our own death from here on."""
        if key in self._offsets:
            raise ValueError(f"{self.path}: key {key!r} has been written already")
        self._offsets[key] = self._write({"key": key, **record})

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise DataError(f"{self.path} is open in another process; wait for it, or write to another path") from cause

    def _load(self) -> None:
        lines = iter(self._lines())
        head = next(lines, None)
        if head is None:
            self._write({"parameters": self._parameters})
            return
        self._check_parameters(head[1])
        for offset, record in lines:
            key = record.get("key")
            if not isinstance(key, str):
                raise DataError(f"{self.path}: the record at byte {offset} has key={key!r}; expected a string")
            self._offsets[key] = offset

    def _lines(self) -> Iterator[tuple[int, Record]]:
        """Yield (byte offset, object) of each line; cuts off a last line that has no end."""
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("%s: dropped its last line, which was cut short", self.path)
                self._file.truncate(offset)
                return
            yield offset, self._parse(line, number)
            offset += len(line)

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            value = json.loads(line)
        except ValueError as cause:
            raise DataError(f"{self.path}:{number}: {cause}; expected one JSON object per line") from cause
        if not isinstance(value, dict):
            raise DataError(f"{self.path}:{number}: {type(value).__name__}; expected a JSON object")
        return value

    def _check_parameters(self, head: Record) -> None:
        found = head.get("parameters")
        if not isinstance(found, dict):
            raise DataError(f"{self.path} does not start with the parameters of a journal; pass another path")
        # Compared as JSON, in which a tuple is a list and a float that is whole keeps its point.
        wanted = json.loads(json.dumps(self._parameters))
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if names:
            shown = ", ".join(f"{name}={found.get(name)!r} (now {wanted.get(name)!r})" for name in sorted(names))
            raise DataError(
                f"{self.path} holds results of other parameters: {shown}; restore them, write to another path, or "
                "delete the file"
            )

    def _write(self, value: Mapping[str, Any]) -> int:
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value, ensure_ascii=True, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return offset


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that could not be finished, and why."""

    id: str
    cause: str


class Unfinished(SearchAgentError):
    """One question could not be finished; the message is the cause that goes to the error list."""


_FAILURES = (RetrieverError, GeneratorError, EngineError, Unfinished)

Work = Callable[[Question], Awaitable[Record]]


async def work_through(
    questions: Sequence[Question],
    work: Work,
    journal: Journal,
    title: str,
    concurrency: int = 64,
    max_failures: int = 32,
) -> list[Failure]:
    """Finish every question that the journal does not hold yet, with a progress bar.

    A question whose `work` raises one of the service errors is a failure; any other exception is a bug and ends the
    run. After `max_failures` of them nothing more is started, because a service is gone.

    Returns:
        One failure for each question that is not in the journal afterwards, in the order of `questions`.
    """
    causes: dict[str, str] = {}
    left = [question for question in questions if question_key(question) not in journal]
    waiting = iter(left)

    async def worker(bar: tqdm) -> None:
        for question in waiting:
            if len(causes) >= max_failures:
                causes[question.id] = f"not tried: {max_failures} questions had failed before it"
                continue
            try:
                journal.append(question_key(question), await work(question))
            except _FAILURES as error:
                causes[question.id] = f"{type(error).__name__}: {error}"
            bar.update()

    with tqdm(total=len(questions), initial=len(questions) - len(left), desc=title, unit="q") as bar:
        workers = [asyncio.create_task(worker(bar)) for _ in range(min(concurrency, len(left)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [Failure(question.id, causes[question.id]) for question in questions if question.id in causes]


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """Write the error list, one JSON object a line; an empty one removes the file of an earlier run."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"id": failure.id, "cause": failure.cause}) for failure in failures]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_finished(failures: Sequence[Failure], total: int, title: str, errors_path: Path) -> None:
    """Write the error list and do nothing more when it is empty.

    Raises:
        Unfinished: some questions failed; says how many, the first cause, and what to do.
    """
    write_failures(errors_path, failures)
    if failures:
        first = failures[0]
        raise Unfinished(
            f"{title}: {len(failures)} of {total} questions failed, listed in {errors_path}; what is finished is kept, "
            f"so fix the cause and run the same command again. The first is {first.id!r}: {first.cause}"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
