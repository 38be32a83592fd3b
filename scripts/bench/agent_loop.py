"""Measure what the agent loop costs over its engine: generated tokens/s, as a ratio within one run.

    python scripts/bench/agent_loop.py --model data_preprocess/world/checkpoints/searcher

The loop plays questions of the embedded world greedily, searching BM25 in this process. Then the same engine is fed
the same contexts as plain prompts, all independent, each with as many tokens to generate as the loop drew there. Both
are run once before they are timed, so both find the same prefixes cached; what remains is the loop's own work, the
search, and that a trajectory's turns must wait for each other.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_preprocess.world.build import WorldConfig, build
from verl.agent.grammar.base import Grammar
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.agent.loop import gather
from verl.agent.protocols import Generation, Sampling
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine, open_index
from verl.types import Question, SearchResult
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

GREEDY = Sampling(temperature=0.0)


class InProcessSearch:
    """A retriever engine as the loop's `search`; counts its seconds."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds = 0.0
        self.latency = 0.0

    async def __call__(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Search, blocking: the world's corpus takes a fraction of a millisecond; then wait out the latency."""
        if self.latency:
            await asyncio.sleep(self.latency)
        began = time.perf_counter()
        results = self.engine.search(queries, topk)
        self.seconds += time.perf_counter() - began
        return results


@dataclass(frozen=True, slots=True)
class Call:
    """One generation: its context, and how many tokens were drawn."""

    prompt_ids: tuple[int, ...]
    tokens: int


class Recorder:
    """Passes generations on to an engine and keeps what was asked."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.calls: list[Call] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Generate, and note the lengths."""
        answer = await self.engine.generate(prompt_ids, sampling)
        self.calls.append(Call(tuple(prompt_ids), len(answer.ids)))
        return answer


@dataclass(frozen=True)
class Setting:
    """What the loop plays with."""

    grammar: Grammar
    search: InProcessSearch
    tokenizer: PreTrainedTokenizerBase
    questions: Sequence[Question]
    concurrency: int


async def play(engine: RolloutEngine, setting: Setting) -> tuple[list[Call], float]:
    """Play all questions; return the generations and the seconds."""
    recorder = Recorder(engine)
    began = time.perf_counter()
    stream = gather(
        setting.questions, setting.grammar, recorder, setting.search, setting.tokenizer, GREEDY, setting.concurrency
    )
    failed = [trajectory.error async for trajectory in stream if trajectory.error]
    seconds = time.perf_counter() - began
    if failed:
        raise SystemExit(f"{len(failed)} trajectories failed, the first with: {failed[0]}")
    return recorder.calls, seconds


async def feed(engine: RolloutEngine, calls: Sequence[Call], concurrency: int) -> float:
    """Generate every call again as a plain prompt; return the seconds."""
    waiting = iter(calls)

    async def client() -> None:
        for call in waiting:
            await engine.generate(call.prompt_ids, replace(GREEDY, max_tokens=call.tokens))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return time.perf_counter() - began


async def measure(engine: RolloutEngine, setting: Setting) -> str:
    """Time both ways, each after a run that warms the caches."""
    await play(engine, setting)
    setting.search.seconds = 0.0
    calls, looped = await play(engine, setting)
    await feed(engine, calls, setting.concurrency)
    plain = await feed(engine, calls, setting.concurrency)
    tokens = sum(call.tokens for call in calls)
    context = sum(len(call.prompt_ids) for call in calls) / len(calls)
    searching = f"{setting.search.seconds:.2f} of {looped:.2f} s in BM25"
    return (
        f"{len(setting.questions)} questions, {setting.concurrency} at a time: {len(calls)} generations, "
        f"{tokens} tokens, contexts of {context:.0f} tokens on average\n"
        f"  agent loop     {tokens / looped:>10.0f} tokens/s   ({searching})\n"
        f"  plain prompts  {tokens / plain:>10.0f} tokens/s\n"
        f"  ratio          {plain / looped:>10.2f}\n"
    )


async def measure_latency(engine: RolloutEngine, setting: Setting, latency: float, repetitions: int = 3) -> str:
    """Time the loop with a retriever that answers at once and one that takes `latency` seconds, in turns."""
    rates: dict[float, list[float]] = {0.0: [], latency: []}
    for setting.search.latency in [0.0, latency] * repetitions:
        calls, seconds = await play(engine, setting)
        rates[setting.search.latency].append(sum(call.tokens for call in calls) / seconds)
    at_once, late = (statistics.median(rates[key]) for key in (0.0, latency))
    return (
        f"  retriever at once        {at_once:>10.0f} tokens/s (median of {repetitions})\n"
        f"  retriever {1000 * latency:4.0f} ms later  {late:>10.0f} tokens/s\n"
        f"  loss                     {1 - late / at_once:>10.1%}\n"
    )


def world_setting(folder: Path, config: EngineConfig, questions: int) -> Setting:
    """Write the world and its index into `folder`; give the first test questions their round-0 documents."""
    files = build(WorldConfig(test=questions), folder)
    corpus = Corpus.open(files.corpus)
    build_index(corpus, "bm25", folder / "bm25")
    bm25 = open_index(folder / "bm25", corpus, "bm25")
    asked = [
        replace(question, initial_documents=bm25.search([question.text], 3)[0].documents)
        for question in read_questions(files.questions("test"))
    ]
    grammar = S3Grammar(
        S3Config(
            topk=3,
            max_generation_tokens=100,
            max_observation_tokens=400,
            max_prompt_tokens=config.max_model_len - 1,
            max_context_tokens=config.max_model_len,
            prompt="compact",
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return Setting(grammar, InProcessSearch(bm25), tokenizer, asked, config.max_num_seqs)


async def bench(config: EngineConfig, questions: int, latency: float) -> str:
    """Start the engine, measure, stop it."""
    with tempfile.TemporaryDirectory() as folder:
        setting = world_setting(Path(folder), config, questions)
        engine = create_engine(config)
        try:
            loop_cost = await measure(engine, setting)
            return loop_cost + (await measure_latency(engine, setting, latency) if latency else "")
        finally:
            await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the agent loop against its engine.")
    parser.add_argument("--model", default="data_preprocess/world/checkpoints/searcher")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--context", type=int, default=1000, help="longest prompt plus trajectory, in tokens")
    parser.add_argument("--latency_ms", type=float, default=100.0, help="of a slow retriever to compare with; 0: none")
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    config = EngineConfig(
        args.model, args.engine, args.dtype, max_model_len=args.context, max_num_seqs=args.concurrency
    )
    sys.stdout.write(asyncio.run(bench(config, args.questions, args.latency_ms / 1000)))


if __name__ == "__main__":
    main()
