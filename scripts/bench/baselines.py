"""Measure every multi-turn baseline against its engine's raw throughput, with and without a barrier between turns.

    python scripts/bench/baselines.py --questions 400

Each protocol is played by the tiny agent on the embedded world, greedily. `loop` is how contexts are collected: one
coroutine a question, no barrier. `plain prompts` feeds the same contexts to the same engine as independent requests.
`lock-step` is what the original systems do: a batch of questions, and nobody goes on before all have finished a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from agent_loop import GREEDY, Recorder, Setting, feed, play, world_setting  # beside this file

from data_preprocess.world import gate
from verl.agent import loop
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.agent.protocols import Generation, Sampling
from verl.types import Question
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine


class LockStep:
    """An engine that holds every request until all running trajectories have one, and every answer until all have."""

    def __init__(self, engine: RolloutEngine | Recorder, running: int) -> None:
        self._engine = engine
        self._running = running
        self._waiting: list[tuple[Sequence[int], Sampling, asyncio.Future[Generation]]] = []
        self._turns: set[asyncio.Task[None]] = set()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Wait for the others, then generate with them."""
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt_ids, sampling, future))
        self._start_if_complete()
        return await future

    def finished(self) -> None:
        """Count one trajectory less."""
        self._running -= 1
        self._start_if_complete()

    def _start_if_complete(self) -> None:
        if self._waiting and len(self._waiting) >= self._running:
            turn = asyncio.create_task(self._turn(self._waiting))
            self._turns.add(turn)
            turn.add_done_callback(self._turns.discard)
            self._waiting = []

    async def _turn(self, calls: list[tuple[Sequence[int], Sampling, asyncio.Future[Generation]]]) -> None:
        answers = await asyncio.gather(*(self._engine.generate(ids, sampling) for ids, sampling, _ in calls))
        for (_, _, future), answer in zip(calls, answers, strict=True):
            future.set_result(answer)


async def play_in_lock_step(engine: RolloutEngine, setting: Setting) -> float:
    """Play all questions, batch by batch; return the seconds."""

    async def one(question: Question, barrier: LockStep) -> None:
        try:
            await loop.run(question, setting.grammar, barrier, setting.search, setting.tokenizer, GREEDY)
        finally:
            barrier.finished()

    began = time.perf_counter()
    for start in range(0, len(setting.questions), setting.concurrency):
        batch = setting.questions[start : start + setting.concurrency]
        barrier = LockStep(engine, len(batch))
        await asyncio.gather(*(one(question, barrier) for question in batch))
    return time.perf_counter() - began


async def measure(engine: RolloutEngine, setting: Setting, name: str, repeats: int) -> str:
    """Time the three ways in turns, after a run of each that warms the caches; return one line of the table.

    Ratios are taken within each turn, in which the machine is equally busy for all, and their medians are shown.
    """
    calls, _ = await play(engine, setting)
    await feed(engine, calls, setting.concurrency)
    await play_in_lock_step(engine, setting)
    rows = []
    for _ in range(repeats):
        calls, looped = await play(engine, setting)
        plain = await feed(engine, calls, setting.concurrency)
        locked = await play_in_lock_step(engine, setting)
        tokens = sum(call.tokens for call in calls)
        rows.append((tokens / plain, tokens / looped, plain / looped, tokens / locked, plain / locked))
    plain, looped, ratio, locked, held = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [row[2] for row in rows]
    return (
        f"  {name:<15}{len(calls):>12}{tokens:>9}{plain:>15.0f}{looped:>9.0f}{ratio:>8.2f}"
        f"{f'{min(ratios):.2f}-{max(ratios):.2f}':>12}{locked:>12.0f}{held:>8.2f}\n"
    )


async def bench(config: EngineConfig, questions: int, repeats: int, only: Sequence[str]) -> AsyncIterator[str]:
    """Start the engine, measure every protocol, stop it; yield the table line by line."""
    protocols: dict[str, SearchConfig] = {name: search for name, search in gate.AGENT.items() if name in only}
    with tempfile.TemporaryDirectory() as folder:
        setting = world_setting(Path(folder), config, questions)
        engine = create_engine(config)
        try:
            yield (
                f"{questions} questions, {setting.concurrency} at a time, tokens/s and ratios to plain prompts "
                f"(medians of {repeats})\n"
                f"  {'protocol':<15}{'generations':>12}{'tokens':>9}{'plain prompts':>15}{'loop':>9}{'ratio':>8}"
                f"{'from-to':>12}{'lock-step':>12}{'ratio':>8}\n"
            )
            for name, search in protocols.items():
                yield await measure(engine, replace(setting, grammar=build_grammar(search)), name, repeats)
        finally:
            await engine.close()


async def print_lines(lines: AsyncIterator[str]) -> None:
    """Write every line as soon as it is there."""
    async for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="data_preprocess/world/checkpoints/agent")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(gate.AGENT), default=list(gate.AGENT))
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    config = EngineConfig(args.model, args.engine, "float32", max_model_len=1024, max_num_seqs=args.concurrency)
    asyncio.run(print_lines(bench(config, args.questions, args.repeats, args.only)))


if __name__ == "__main__":
    main()
