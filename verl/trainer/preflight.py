"""What can be wrong with a configuration, found before any process starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from verl.errors import ConfigError
from verl.rewards.registry import Scorer
from verl.trainer.config import TrainConfig
from verl.types import Question
from verl.workers.engines import why_not_updatable


def check(config: TrainConfig, questions: Sequence[Question]) -> None:
    """Refuse a configuration that could not run.

    Args:
        questions: training and validation questions.

    Raises:
        ConfigError: every problem found, each with its fix, in one message.
        DataError: a question lacks what the reward needs, for example its baseline.
    """
    problems = [*_batches(config), *_sampling(config), *_lengths(config), *_devices(config)]
    if problems:
        raise ConfigError("; also: ".join(problems))
    Scorer(config.reward, _never).validate(questions)


async def _never(*_: object) -> object:
    raise AssertionError("the preflight check asks no generator")


def _batches(config: TrainConfig) -> Iterator[str]:
    trajectories = config.data.batch_size * config.rollout.samples
    for name, plan in (("actor", config.actor.update), ("critic", config.critic.update)):
        size = plan.mini_batch_size
        if size is not None and trajectories % size:
            yield (
                f"{name}.update.mini_batch_size={size} does not divide the {trajectories} trajectories of a step "
                f"(data.batch_size={config.data.batch_size} x rollout.samples={config.rollout.samples}); choose a "
                "divisor"
            )
    if config.algorithm.estimator in ("grpo", "rloo") and config.rollout.samples < 2:
        yield (
            f"algorithm.estimator={config.algorithm.estimator} compares samples of one question, but rollout.samples="
            f"{config.rollout.samples}; set it to at least 2"
        )


def _sampling(config: TrainConfig) -> Iterator[str]:
    for name, temperature in (("actor", config.actor.temperature), ("reference", config.reference.temperature)):
        if temperature != config.rollout.temperature:
            yield (
                f"{name}.temperature={temperature} differs from rollout.temperature={config.rollout.temperature}; "
                "log-probabilities would be of another distribution than the samples: make them equal"
            )


def _lengths(config: TrainConfig) -> Iterator[str]:
    model = _model_config(config.model.path)
    limit = getattr(model, "max_position_embeddings", None)
    search, engine = config.search, config.engine
    if engine.max_model_len < search.max_context_tokens:
        yield (
            f"search.max_context_tokens={search.max_context_tokens} exceeds engine.max_model_len="
            f"{engine.max_model_len}; raise the engine's or lower the search's"
        )
    if limit is not None and engine.max_model_len > limit:
        yield (
            f"engine.max_model_len={engine.max_model_len} exceeds the {limit} positions of {config.model.path}; lower "
            "engine.max_model_len and search.max_context_tokens, or take a model with a longer context"
        )
    if not AutoTokenizer.from_pretrained(config.model.path).chat_template:
        yield f"{config.model.path}: its tokenizer has no chat template; use an instruct model"
    tied = bool(getattr(model, "tie_word_embeddings", False))
    reason = why_not_updatable(tied, on_cpu=config.hardware.device == "cpu") if engine.kind == "vllm" else ""
    if reason:
        yield reason


def _devices(config: TrainConfig) -> Iterator[str]:
    wanted = config.hardware
    if wanted.device == "cuda" and config.ray.address is None:
        there = torch.cuda.device_count()
        if wanted.devices_per_node > there:
            yield (
                f"hardware.devices_per_node={wanted.devices_per_node} GPUs, but this machine has {there}; lower it, or "
                "set ray.address to join a cluster that has them"
            )


def _model_config(path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as cause:
        where = "it is not a folder" if not Path(path).is_dir() else "the folder is no Hugging Face model"
        raise ConfigError(f"model.path={path}: {where} ({cause}); give a model folder or hub name") from cause
