"""Measure ExSearch's E-step against its engine's raw throughput: generated tokens/s, as ratios of paired rounds.

    python scripts/bench/exsearch_estep.py --model outputs/exsearch_world/sft/model

`E-step` is the stage `inference` as it runs: K sampled trajectories a question, BM25 in this process, every question
written to the journal. `plain prompts` feeds the same contexts to the same engine as independent requests, each with as
many tokens to generate as were drawn there. Rounds alternate, so that whatever else the machine does hits both alike.
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
from dataclasses import replace
from pathlib import Path

from agent_loop import Call, InProcessSearch, Recorder  # beside this file
from transformers import AutoTokenizer

from data_preprocess.world.build import WorldConfig, build
from verl.agent.grammar.exsearch import ExSearchConfig
from verl.records import read_questions
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index
from verl.trainer.exsearch.config import SamplingConfig
from verl.trainer.exsearch.files import EpochFiles
from verl.trainer.exsearch.sample import Environment, sample
from verl.types import Question
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

SEARCH = ExSearchConfig(
    topk=3,
    shown=3,
    max_turns=4,
    max_generation_tokens=48,
    max_observation_tokens=200,
    max_prompt_tokens=400,
    max_context_tokens=1000,
    prompt="compact",
)


async def estep(
    engine: RolloutEngine,
    questions: Sequence[Question],
    search: InProcessSearch,
    config: SamplingConfig,
    model: str,
    folder: Path,
) -> tuple[list[Call], float]:
    """Run the sampling stage into `folder`; return its generations and the seconds."""
    recorder = Recorder(engine)
    around = Environment(SEARCH, recorder, search, AutoTokenizer.from_pretrained(model))
    files = EpochFiles(folder, 1, "train", "policy", 0, len(questions))
    began = time.perf_counter()
    counts = await sample(questions, around, config, 0, files, {"bench": 1})
    seconds = time.perf_counter() - began
    if counts["failed"]:
        raise SystemExit(f"{counts['failed']} trajectories failed")
    return recorder.calls, seconds


async def plain(
    engine: RolloutEngine, calls: Sequence[Call], config: SamplingConfig, at_once: int
) -> tuple[int, float]:
    """Generate every call again as an independent prompt; return the tokens that came and the seconds."""
    waiting, tokens, own = iter(enumerate(calls)), 0, config.sampling(0)

    async def client() -> None:
        nonlocal tokens
        for number, call in waiting:
            answer = await engine.generate(call.prompt_ids, replace(own, max_tokens=call.tokens, seed=number))
            tokens += len(answer.ids)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return tokens, time.perf_counter() - began


async def bench(config: EngineConfig, count: int, sampling: SamplingConfig, rounds: int) -> str:
    """Start the engine, measure, stop it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = build(WorldConfig(train=count), folder / "world")
        corpus = Corpus.open(files.corpus)
        build_index(corpus, "bm25", folder / "bm25")
        search = InProcessSearch(open_index(folder / "bm25", corpus, "bm25"))
        questions = read_questions(files.questions("train"))
        engine = create_engine(config)
        try:
            # A first round warms both ways up: caches, threads, code.
            calls, _ = await estep(engine, questions, search, sampling, config.model, folder / "warm")
            await plain(engine, calls, sampling, sampling.in_flight)
            lines, ratios = [], []
            for number in range(rounds):
                calls, seconds = await estep(engine, questions, search, sampling, config.model, folder / str(number))
                looped = sum(call.tokens for call in calls) / seconds
                tokens, seconds = await plain(engine, calls, sampling, sampling.in_flight)
                ratios.append(looped / (tokens / seconds))
                lines.append(f"  round {number + 1}   {looped:>8.0f} {tokens / seconds:>14.0f} {ratios[-1]:>8.2f}\n")
        finally:
            await engine.close()
    head = (
        f"{count} questions x {sampling.samples} trajectories, {sampling.in_flight} in flight, {config.max_num_seqs} "
        f"decoded at a time, {len(calls)} generations\n  tokens/s    E-step  plain prompts    ratio\n"
    )
    return head + "".join(lines) + f"  median ratio {statistics.median(ratios):>33.2f}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="data_preprocess/world/checkpoints/searcher")
    parser.add_argument("--engine", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--in_flight", type=int, default=256)
    parser.add_argument("--max_num_seqs", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    config = EngineConfig(args.model, args.engine, "float32", max_model_len=1000, max_num_seqs=args.max_num_seqs)
    sampling = SamplingConfig(args.samples, args.temperature, top_p=1.0, in_flight=args.in_flight)
    sys.stdout.write(asyncio.run(bench(config, args.questions, sampling, args.rounds)))


if __name__ == "__main__":
    main()
