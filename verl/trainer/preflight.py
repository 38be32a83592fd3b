"""What can be wrong with a configuration, found before any process starts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from verl.algorithms.kl import MAX_ERROR
from verl.errors import ConfigError, DataError
from verl.retrieval.engines.literature import PUB_DATE
from verl.rewards.evidence import Tools
from verl.rewards.registry import Scorer
from verl.trainer.config import TrainConfig
from verl.types import Question
from verl.workers.engines import why_not_updatable

logger = logging.getLogger(__name__)

_BY_IDS = ("retrieval_recall", "ndcg")
"""Rewards that read nothing of a document but its id."""


def check(config: TrainConfig, questions: Sequence[Question]) -> None:
    """Refuse a configuration that could not run.

    Args:
        questions: training and validation questions.

    Raises:
        ConfigError: every problem found, each with its fix, in one message; or, where the settings are fine, what the
            questions lack for the configured reward, for example their baseline.
    """
    checks = (_batches, _groups, _kl, _sampling, _lengths, _engine, _devices, _tracking, _databases, _literature)
    problems = [problem for find in checks for problem in find(config)]
    if problems:
        raise ConfigError("; also: ".join(problems))
    _warn_of_dates(config, questions)
    try:
        judge = _never if config.judge else None
        tools = Tools(likelihood=_never, sampler=_never, sql=_never if config.reward.sql else None)
        Scorer(config.reward, _never, judge, tools).validate(questions)
    except DataError as cause:
        raise ConfigError(f"data.train and data.validation do not fit the reward: {cause}") from cause


async def _never(*_: object) -> object:
    raise AssertionError("the preflight check asks no generator")


def _batches(config: TrainConfig) -> Iterator[str]:
    trajectories = config.data.batch_size * config.rollout.samples
    plans = {"actor": config.actor.update} | ({"critic": config.critic.update} if config.algorithm.needs_critic else {})
    for name, plan in plans.items():
        size = plan.mini_batch_size
        if size is not None and trajectories % size:
            yield (
                f"{name}.update.mini_batch_size={size} does not divide the {trajectories} trajectories of a step "
                f"(data.batch_size={config.data.batch_size} x rollout.samples={config.rollout.samples}); choose a "
                "divisor"
            )


def _groups(config: TrainConfig) -> Iterator[str]:
    algorithm, samples = config.algorithm, config.rollout.samples
    if samples >= 2:
        return
    if algorithm.compares_samples:
        yield (
            f"algorithm.estimator={algorithm.estimator} compares samples of one question, but rollout.samples="
            f"{samples}; set it to at least 2"
        )
    if algorithm.dynamic_sampling:
        yield (
            f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} drops questions whose samples score alike, which "
            f"with rollout.samples={samples} is all of them; set it to at least 2, or dynamic_sampling to 0"
        )


def _kl(config: TrainConfig) -> Iterator[str]:
    algorithm = config.algorithm
    trajectories = config.data.batch_size * config.rollout.samples
    if algorithm.kl_target is not None and trajectories * MAX_ERROR >= algorithm.kl_horizon:
        yield (
            f"algorithm.kl_horizon={algorithm.kl_horizon} is too short for {trajectories} trajectories a step, which "
            f"could turn the coefficient negative; raise it above {trajectories * MAX_ERROR:g}"
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
    if not _tokenizer(config.model.path).chat_template:
        yield f"model.path={config.model.path}: its tokenizer has no chat template; use an instruct model"


def _engine(config: TrainConfig) -> Iterator[str]:
    engine, hardware = config.engine, config.hardware
    if engine.model != config.actor.model.path:
        yield (
            f"engine.model={engine.model} differs from actor.model.path={config.actor.model.path}, whose weights it is "
            "to sample from; set model.path alone, which both follow"
        )
    if engine.kind != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        yield "engine.kind=vllm, but vLLM is not installed; install it (scripts/install.sh) or set engine.kind=hf"
    if engine.tensor_parallel_size != hardware.devices_per_engine:
        yield (
            f"engine.tensor_parallel_size={engine.tensor_parallel_size} differs from hardware.devices_per_engine="
            f"{hardware.devices_per_engine}; set the latter alone, which the engine follows"
        )
    tied = bool(getattr(_model_config(config.model.path), "tie_word_embeddings", False))
    reason = why_not_updatable(tied, on_cpu=hardware.device == "cpu")
    if reason:
        yield f"model.path={config.model.path}: {reason}"


def _devices(config: TrainConfig) -> Iterator[str]:
    wanted = config.hardware
    if wanted.device == "cuda" and config.ray.address is None:
        there = torch.cuda.device_count()
        if wanted.devices_per_node > there:
            yield (
                f"hardware.devices_per_node={wanted.devices_per_node} GPUs, but this machine has {there}; lower it, or "
                "set ray.address to join a cluster that has them"
            )
    if config.rollout.mode != "sync" and wanted.device == "cuda" and wanted.colocate:
        yield (
            f"rollout.mode={config.rollout.mode} rolls out while it trains, but hardware.colocate=true lets both use "
            "the same GPUs in turns; set hardware.colocate=false and hardware.rollout_devices, or rollout.mode=sync"
        )


def _tracking(config: TrainConfig) -> Iterator[str]:
    for backend in config.tracking.backends:
        if importlib.util.find_spec(backend) is None:
            yield f"tracking.backends names {backend}, which is not installed; pip install {backend}, or leave it out"


def _databases(config: TrainConfig) -> Iterator[str]:
    sql = config.reward.sql
    if sql is not None and not sql.databases.is_dir():
        yield f"reward.sql.databases={sql.databases} is no folder; name the folder of the databases"


def _literature(config: TrainConfig) -> Iterator[str]:
    searched = config.literature
    if searched is not None and config.search.topk > searched.max_topk:
        yield (
            f"search.topk={config.search.topk} exceeds the {searched.max_topk} records that {searched.engine} gives "
            "for a query; lower it"
        )
    by_text = [name for name in config.reward.terms if name not in _BY_IDS]
    if searched is None and config.retriever.ids_only and by_text:
        yield (
            f"retriever.ids_only=true, but {', '.join(by_text)} may read the documents' texts, which are then empty; "
            f"set it to false, or reward by {' and '.join(_BY_IDS)} alone"
        )


def _warn_of_dates(config: TrainConfig, questions: Sequence[Question]) -> None:
    """Say how many questions would be answered from what was published after them."""
    undated = sum(PUB_DATE not in question.extra for question in questions)
    if config.literature is not None and config.literature.dated and undated:
        logger.warning(
            "%d of %d questions have no extra.%s: nothing limits their search to what was published before them",
            undated,
            len(questions),
            PUB_DATE,
        )


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"model.path={path}: its tokenizer does not load ({cause}); give a complete model") from cause


def _model_config(path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as cause:
        where = "it is not a folder" if not Path(path).is_dir() else "the folder is no Hugging Face model"
        raise ConfigError(f"model.path={path}: {where} ({cause}); give a model folder or hub name") from cause
