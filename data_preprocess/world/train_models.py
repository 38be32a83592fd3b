"""Train the tiny models of the embedded world and put them through the gate.

    python -m data_preprocess.world.train_models --save_dir data_preprocess/world/checkpoints

All share one pretraining. The generator is what it ends with; the base searcher (s3) and the agent, which speaks the
protocols of the baselines, are tuned on from it, with demonstrations of mixed quality, so that reinforcement learning
has something to win.

The committed checkpoints: seed 0, one core, about 10,500 tokens/s; 11, 25 and 4 minutes for the three pretraining
stages, 3 for the searcher's demonstrations, 5 for the agent's. Their first two stages ran before the tokenizer split a
digit from the space before it, as AutoTokenizer makes every Qwen2 checkpoint do; the third stage adapted them to it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from data_preprocess.world import gate
from data_preprocess.world.agent_lessons import AgentLessons
from data_preprocess.world.lessons import Lesson, LessonMaker
from data_preprocess.world.pretrain import PretrainConfig, fill, pretrain, tiny_model
from data_preprocess.world.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

# First one document at a time, at a constant rate, until facts are looked up; then up to nine, decaying to zero.
PRETRAINING = (
    PretrainConfig(tokens=6_600_000, learning_rate=1.5e-3, decay=0.0, max_documents=1),
    PretrainConfig(tokens=16_000_000, learning_rate=1.5e-3, decay=0.4, level=2, seed=1),
    PretrainConfig(tokens=2_000_000, learning_rate=7e-4, decay=1.0, level=9, seed=3),
)
DEMONSTRATIONS = PretrainConfig(tokens=1_500_000, learning_rate=5e-4, decay=0.8, searching=1.0, seed=2)
AGENT_DEMONSTRATIONS = PretrainConfig(tokens=3_000_000, learning_rate=7e-4, decay=0.8, seed=4)


@dataclass(frozen=True)
class Recipe:
    """What `main` trains.

    Attributes:
        expert: share of the searcher's demonstrations that are played well.
        agent_expert: the same of the agent's.
        agent_rewriting: share of the agent's DeepRetrieval queries that are in the words of the passages; low, so that
            the untrained policy repeats the question and training has something to win.
        scale: multiplies every token budget; below 1 only to try the script.
    """

    seed: int = 0
    expert: float = 0.25
    agent_expert: float = 0.6
    agent_rewriting: float = 0.25
    scale: float = 1.0


def train_generator(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path) -> None:
    """Pretrain from scratch; each stage starts from the bfloat16 checkpoint of the one before."""
    model = tiny_model(tokenizer, recipe.seed)
    for stage in PRETRAINING:
        pretrain(model, tokenizer, _scaled(stage, recipe), folder)
        model = _load(folder)


def train_searcher(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, generator: Path, folder: Path) -> None:
    """Tune the pretrained model on demonstrations of mixed quality."""
    pretrain(_load(generator), tokenizer, _scaled(DEMONSTRATIONS, recipe), folder, demonstrations(recipe.expert))


def train_agent(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, generator: Path, folder: Path) -> None:
    """Tune the pretrained model on demonstrations in the protocols of the baselines."""
    config = _scaled(AGENT_DEMONSTRATIONS, recipe)
    lessons = AgentLessons(tokenizer, config.seed, recipe.agent_expert, recipe.agent_rewriting)
    pretrain(_load(generator), tokenizer, config, folder, lambda maker, level: fill(lessons.any, config.batch_tokens))


def demonstrations(expert: float) -> Callable[[LessonMaker, int], list[Lesson]]:
    """Return a source of s3 trajectories, the share `expert` of them played well."""
    return lambda maker, level: fill(lambda: maker.searching(expert), DEMONSTRATIONS.batch_tokens)


def _scaled(config: PretrainConfig, recipe: Recipe) -> PretrainConfig:
    return replace(config, tokens=int(config.tokens * recipe.scale), seed=config.seed + 1000 * recipe.seed)


def _load(folder: Path) -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exits with 1 when the gate is not passed."""
    parser = argparse.ArgumentParser(description="Train the tiny models of the embedded world.")
    parser.add_argument("--save_dir", type=Path, required=True, help="gets generator/, searcher/ and agent/")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--expert", type=float, default=Recipe.expert, help="share of good demonstrations")
    parser.add_argument("--scale", type=float, default=Recipe.scale, help="multiplies the token budgets")
    parser.add_argument("--only", choices=("generator", "searcher", "agent", "gate"), help="run one stage alone")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.seed, options.expert, options.scale)
    generator, searcher = options.save_dir / "generator", options.save_dir / "searcher"
    if options.only in ("searcher", "agent", "gate") and not (generator / "config.json").is_file():
        parser.error(f"--only {options.only} needs the generator, but {generator} holds no checkpoint; train it first")
    tokenizer = train_tokenizer()
    started = time.monotonic()
    if options.only in (None, "generator"):
        train_generator(tokenizer, recipe, generator)
    if options.only in (None, "searcher"):
        train_searcher(tokenizer, recipe, generator, searcher)
    if options.only in (None, "agent"):
        train_agent(tokenizer, recipe, generator, options.save_dir / "agent")
    logger.info("training took %.0f s", time.monotonic() - started)
    agent = options.save_dir / "agent"
    built = [folder if folder.exists() else None for folder in (searcher, agent)]
    checks = asyncio.run(gate.measure(generator, *built))
    sys.stdout.write("\n".join(check.line() for check in checks) + "\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
