"""Soak the reply cache: many processes score through one file, are killed at random and started again.

    python scripts/bench/cache_soak.py [--scores 50000] [--processes 8] [--kills 40]

A score is what training asks for: a generation and a judge call, through its own scorer and client. A local server
answers with texts that follow from the request, so that every score is known beforehand. Each process scores its share
of the questions, most of them shared with another process and all of them several times, and notes a question once
its score came back. The parent kills processes (SIGKILL) at random and starts them again where their notes end. In the
end the server is switched off: every question must replay from the cache to its score, the cache must hold nothing
else, and no process may have met an error.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from generator_llms.cache import ReplyCache
from generator_llms.client import GeneratorClient
from generator_llms.config import CacheMode, GeneratorConfig
from generator_llms.judge import LLMJudge
from verl.errors import GeneratorError
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Document, Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger("bench.cache_soak")

_SPAWN = multiprocessing.get_context("spawn")
_AT_ONCE = 32
_LINE = 12
"""Bytes of a note."""
_PATIENCE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What is soaked; `kills` are spread over the run at random."""

    scores: int
    processes: int
    kills: int
    seed: int = 0

    @property
    def share(self) -> int:
        """Questions that each process asks."""
        return self.scores // self.processes

    def questions(self, process: int) -> list[int]:
        """Return what a process asks, in its order: half its own and its neighbour's questions, each of them twice."""
        half = max(1, self.share // 4)
        mine = [(process * half + i) % (self.processes * half) for i in range(2 * half)]
        asked = (mine * (self.share // len(mine) + 1))[: self.share]
        random.Random(f"{self.seed} {process}").shuffle(asked)
        return asked


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a soak found.

    Attributes:
        asked: scores that came back to a process.
        entries: replies in the cache in the end; two for each question.
        lost: questions that came back and cannot be replayed.
        wrong: questions that replay to something else than they should, and entries that nobody asked for.
        errors: what the processes met, other than being killed.
        damage: what sqlite's own check of the file says, unless all is well.
    """

    asked: int
    expected: int
    entries: int
    kills: int
    seconds: float
    lost: int
    wrong: int
    errors: tuple[str, ...]
    damage: str

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, wrong or refused."""
        return not (self.lost or self.wrong or self.errors or self.damage) and self.asked == self.expected

    def __str__(self) -> str:
        lines = [
            f"{self.asked} of {self.expected} scores in {self.seconds:.0f} s, {self.kills} processes killed, "
            f"{self.entries} entries",
            f"lost {self.lost}, wrong {self.wrong}, errors {len(self.errors)}, damage: {self.damage or 'none'}",
            *self.errors[:3],
            "PASSED" if self.passed else "FAILED",
        ]
        return "\n".join(lines)


def answer_to(text: str) -> str:
    """Return what the server answers: a text of some length that follows from the question."""
    return hashlib.sha256(text.encode()).hexdigest() * 8


def verdict_on(answer: str) -> bool:
    """Return what the server judges of an answer."""
    return int(answer[0], 16) % 2 == 0


def trajectory_of(number: int) -> Trajectory:
    """Return a question with a short context."""
    question = Question(f"soak/{number}", f"question {number}", ("Paris",), "soak")
    document = Document(str(number), "Title", f"fact {number} " * 10)
    return Trajectory(question, (1,), (), Stop.FINISHED, (document,))


def is_right(number: int, outcome: RewardOutcome) -> bool:
    """Tell whether an outcome is the one that the server's texts make."""
    answer = answer_to(f"question {number}")
    correct = verdict_on(answer)
    return (outcome.answer, outcome.correct, outcome.score, outcome.failed) == (answer, correct, float(correct), "")


def scorer_of(client: GeneratorClient) -> Scorer:
    """Return the scorer of a training run whose reward is accuracy."""
    return Scorer(RewardConfig({"generation_accuracy": 1.0}), client.answer, LLMJudge(client.complete))


def serve(ready: Connection) -> None:
    """Answer chat requests until killed; tells the port."""
    asyncio.run(_serve(ready))


async def _serve(ready: Connection) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                asked = json.loads(await reader.readexactly(length))["messages"][-1]["content"]
                _, judging, answer = asked.partition("Response: ")
                said = ("yes" if verdict_on(answer) else "no") if judging else answer_to(asked)
                message = {"role": "assistant", "content": said}
                body = json.dumps({"model": "soak", "choices": [{"message": message, "finish_reason": "stop"}]})
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body.encode()))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def work(settings: Settings, process: int, base_url: str, folder: Path) -> None:
    """Ask the share of one process, going on where its notes end; an error is written beside them."""
    try:
        asyncio.run(_work(settings, process, base_url, folder))
    except (GeneratorError, sqlite3.Error) as error:
        (folder / f"{process}.error").write_text(repr(error), encoding="utf-8")
        raise


async def _work(settings: Settings, process: int, base_url: str, folder: Path) -> None:
    notes = folder / f"{process}.notes"
    done = len(_noted(notes))
    questions = settings.questions(process)
    async with GeneratorClient(_config(base_url, folder)) as client:
        scorer = scorer_of(client)
        with notes.open("r+b" if notes.exists() else "wb") as file:
            file.seek(done * _LINE)  # over a note that was being written
            for start in range(done, len(questions), _AT_ONCE):
                batch = questions[start : start + _AT_ONCE]
                outcomes = await asyncio.gather(*(scorer(trajectory_of(number)) for number in batch))
                for number, outcome in zip(batch, outcomes, strict=True):
                    if not is_right(number, outcome):
                        raise GeneratorError(f"question {number} was scored {outcome}")
                file.write(b"".join(f"{number:0{_LINE - 1}d}\n".encode() for number in batch))
                file.flush()
        if client.stats.cache_failures:
            raise GeneratorError(f"{client.stats.cache_failures} replies could not be kept")


def _config(base_url: str, folder: Path, mode: CacheMode = "use") -> GeneratorConfig:
    return GeneratorConfig(
        base_url,
        model="soak",
        check_model=False,
        concurrency=_AT_ONCE,
        cache_path=folder / "replies.sqlite",
        cache_mode=mode,
    )


def _noted(notes: Path) -> list[int]:
    """Return the questions that were noted as a whole."""
    content = notes.read_bytes() if notes.exists() else b""
    return [int(content[i : i + _LINE]) for i in range(0, len(content) - len(content) % _LINE, _LINE)]


def soak(settings: Settings, folder: Path) -> Verdict:
    """Run everything in `folder` and look at what is left."""
    hears, tells = _SPAWN.Pipe(duplex=False)
    server = _SPAWN.Process(target=serve, args=(tells,), daemon=True)
    server.start()
    started = time.monotonic()
    try:
        if not hears.poll(60):
            raise GeneratorError("the soak's server did not start within 60 s; run it on a less busy machine")
        kills = _run_all(settings, f"http://127.0.0.1:{hears.recv()}/v1", folder)
    finally:
        server.terminate()
        server.join()
    return judge(settings, folder, kills, time.monotonic() - started)


def _run_all(settings: Settings, base_url: str, folder: Path) -> int:
    """Run all processes to their end, killing some on the way; return how many were killed."""
    chance = random.Random(settings.seed)
    # A kill each time that so many more scores are noted, the distance drawn at random around an even spread.
    distance = settings.processes * settings.share / (settings.kills + 1)
    due = distance * chance.uniform(0.5, 1.0)
    kills = 0

    def start(process: int) -> BaseProcess:
        worker = _SPAWN.Process(target=work, args=(settings, process, base_url, folder))
        worker.start()
        return worker

    running = {process: start(process) for process in range(settings.processes)}
    deadline = time.monotonic() + _PATIENCE_S
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.05)
            for process, worker in list(running.items()):
                if worker.exitcode == -signal.SIGKILL:
                    running[process] = start(process)
                elif worker.exitcode is not None:
                    del running[process]
            if kills < settings.kills and running and _progress(settings, folder) >= due:
                victim = chance.choice(list(running.values()))
                if victim.pid is not None and victim.exitcode is None:
                    os.kill(victim.pid, signal.SIGKILL)
                    victim.join()
                    kills += 1
                    due += distance * chance.uniform(0.7, 1.2)
                    logger.info("killed %d of %d", kills, settings.kills)
    finally:
        for worker in running.values():
            worker.kill()
            worker.join()
    return kills


def _progress(settings: Settings, folder: Path) -> int:
    notes = (folder / f"{process}.notes" for process in range(settings.processes))
    return sum(path.stat().st_size // _LINE for path in notes if path.exists())


def judge(settings: Settings, folder: Path, kills: int, seconds: float) -> Verdict:
    """Replay every question that was noted, with the server switched off."""
    noted = [_noted(folder / f"{process}.notes") for process in range(settings.processes)]
    distinct = sorted(set().union(*noted))
    lost, wrong = asyncio.run(_replay(distinct, folder))
    cache = ReplyCache(folder / "replies.sqlite")
    entries = cache.count()
    cache.close()
    with closing(sqlite3.connect(folder / "replies.sqlite")) as connection:
        check = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return Verdict(
        asked=sum(map(len, noted)),
        expected=settings.processes * settings.share,
        entries=entries,
        kills=kills,
        seconds=seconds,
        lost=lost,
        wrong=wrong + max(0, entries - 2 * len(distinct)),
        errors=tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.error"))),
        damage="" if check == "ok" else str(check),
    )


async def _replay(numbers: Sequence[int], folder: Path) -> tuple[int, int]:
    """Return how many questions the cache cannot answer, and how many it answers wrongly."""
    async with GeneratorClient(_config("http://127.0.0.1:9/v1", folder, "replay")) as client:
        scorer = scorer_of(client)
        outcomes = [await scorer(trajectory_of(number)) for number in numbers]
    lost = sum(bool(outcome.failed) for outcome in outcomes)
    right = sum(is_right(number, outcome) for number, outcome in zip(numbers, outcomes, strict=True))
    return lost, len(numbers) - right - lost


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak and write its verdict to stdout; returns 0 if it passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scores", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    settings = Settings(**vars(parser.parse_args(argv)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        verdict = soak(settings, Path(folder))
    sys.stdout.write(f"{verdict}\n")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
