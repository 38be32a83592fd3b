"""Recipes compose, and the published ones hold the published numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from verl.config import CONFIG_DIR, build, compose, to_dict, to_yaml
from verl.errors import ConfigError
from verl.trainer.config import TrainConfig

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml"))
GROUPS = [
    f"{folder.name}={path.stem}"
    for folder in sorted(CONFIG_DIR.iterdir())
    if folder.is_dir() and folder.name in ("algorithm", "data", "hardware", "model")
    for path in sorted(folder.glob("*.yaml"))
]

# The table of train_s3 (specs of the published trainer): what the script or the trainer's defaults set. Token budgets
# take the place of its micro-batch sizes, and the run ends at the reference checkpoint, after 20 steps of 120.
TRAIN_S3: Mapping[str, object] = {
    "model.path": "Qwen/Qwen2.5-7B-Instruct-1M",
    "model.gradient_checkpointing": True,
    "model.param_offload": True,
    "hardware.device": "cuda",
    "hardware.nodes": 1,
    "hardware.devices_per_node": 5,
    "hardware.devices_per_engine": 1,
    "data.batch_size": 120,
    "data.seed": 42,
    "data.drop_yes_no": True,
    "data.drop_rag_correct": True,
    "search.topk": 8,
    "search.max_selected": 3,
    "search.max_turns": 3,
    "search.max_prompt_tokens": 8000,
    "search.max_generation_tokens": 500,
    "search.max_observation_tokens": 1400,
    "search.prompt": "published",
    "rollout.samples": 1,
    "rollout.temperature": 0.6,
    "rollout.top_p": 0.95,
    "rollout.top_k": -1,
    "engine.gpu_memory_utilization": 0.4,
    "engine.dtype": "bfloat16",
    "algorithm.estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.whiten": True,
    "algorithm.kl_in_reward": True,
    "algorithm.kl_kind": "k1",
    "algorithm.kl_coef": 0.001,
    "algorithm.kl_target": None,
    "algorithm.critic_warmup": 0,
    "algorithm.dynamic_sampling": 0,
    "actor.temperature": 0.6,
    "actor.update.mini_batch_size": 30,
    "actor.update.epochs": 1,
    "actor.loss.kind": "ppo",
    "actor.loss.clip_low": 0.2,
    "actor.loss.clip_high": 0.2,
    "actor.loss.entropy_coef": 0.001,
    "actor.loss.kl_coef": 0.0,
    "actor.optim.lr": 1e-6,
    "actor.optim.betas": [0.9, 0.999],
    "actor.optim.weight_decay": 0.01,
    "actor.optim.grad_clip": 1.0,
    "actor.optim.schedule": "constant",
    "actor.optim.warmup_ratio": 0.0,
    "actor.optim.warmup_steps": None,
    "critic.optim.lr": 1e-5,
    "critic.optim.warmup_steps": 15,  # 0.01 of 1,500 steps
    "critic.optim.betas": [0.9, 0.999],
    "critic.optim.weight_decay": 0.01,
    "critic.optim.grad_clip": 1.0,
    "critic.optim.schedule": "constant",
    "critic.update.mini_batch_size": 30,
    "critic.update.epochs": 1,
    "critic.value_clip": 0.5,
    "reward.terms": {"gain": 1.0},
    "reward.gain": "released",
    "judge": True,
    "retriever.url": "http://127.0.0.1:3000/retrieve",
    "trainer.seed": 42,
    "trainer.total_steps": 20,
}


def composed(*overrides: str) -> TrainConfig:
    return compose("train", list(overrides), TrainConfig)


def value(config: TrainConfig, key: str) -> object:
    """Return what stands under a dotted key."""
    found: object = to_dict(config)
    for name in key.split("."):
        assert isinstance(found, Mapping)
        found = found[name]
    return found


def different(config: TrainConfig, expected: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return what is otherwise than expected, as (found, expected)."""
    found = {key: value(config, key) for key in expected}
    return {key: (found[key], expected[key]) for key in expected if found[key] != expected[key]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_its_yaml_can_be_read_back(recipe: str) -> None:
    config = composed(f"recipe={recipe}")
    assert build(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    composed(choice)


def test_s3_8_3_3_holds_the_published_hyperparameters() -> None:
    assert different(composed("recipe=s3_8_3_3"), TRAIN_S3) == {}


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        (
            "s3_1.5b",
            {
                "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
                "hardware.devices_per_node": 3,
                "data.batch_size": 96,
                "actor.update.mini_batch_size": 48,
                "critic.update.mini_batch_size": 48,
            },
        ),
        ("s3_5_3_4", {"search.topk": 5, "search.max_turns": 4}),
        (
            "s3_grpo",
            {
                "model.path": "Qwen/Qwen2.5-7B",
                "hardware.devices_per_node": 4,
                "data.batch_size": 256,
                "search.topk": 3,
                "search.max_turns": 4,
                "search.max_prompt_tokens": 6000,
                "search.max_observation_tokens": 800,
                "rollout.samples": 5,
                "rollout.temperature": 1.0,
                "algorithm.estimator": "grpo",
                "algorithm.kl_in_reward": False,
                "actor.temperature": 1.0,
                "actor.update.mini_batch_size": 128,
                "actor.loss.kl_coef": 0.001,
                "actor.loss.kl_kind": "k3",
                "actor.optim.warmup_steps": 570,  # 0.285 of 2,000 steps
            },
        ),
    ],
)
def test_the_other_published_recipes_differ_from_it_as_published(recipe: str, changed: dict[str, object]) -> None:
    assert different(composed(f"recipe={recipe}"), {**TRAIN_S3, **changed}) == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_components_that_must_agree_do(recipe: str) -> None:
    config = composed(f"recipe={recipe}", "model.dtype=fp32", "hardware.devices_per_engine=1", "trainer.total_steps=7")
    assert {config.actor.model.path, config.reference.model.path, config.engine.model} == {config.model.path}
    # A run that starts from another one's checkpoint has the critic's export there, in a folder of its own.
    assert config.critic.model.path == config.model.path or config.critic.model.path.endswith("/hf/critic")
    assert {config.actor.model.dtype, config.critic.model.dtype, config.reference.model.dtype} == {"fp32"}
    assert config.actor.temperature == config.reference.temperature == config.rollout.temperature
    assert config.engine.tensor_parallel_size == config.hardware.devices_per_engine
    assert config.actor.optim.total_steps == config.critic.optim.total_steps == 7
    assert config.engine.max_model_len >= config.search.max_context_tokens


def test_the_quickstart_keeps_to_the_published_budget_of_questions() -> None:
    for recipe in ("quickstart", "quickstart_ppo"):
        config = composed(f"recipe={recipe}")
        assert config.data.batch_size * config.trainer.total_steps <= 2400


def test_a_group_on_the_command_line_wins_over_the_recipe_and_the_data_over_both() -> None:
    config = composed("recipe=s3_1.5b", "hardware=cpu", "model=tiny", "data=world")
    expected = {
        "hardware.device": "cpu",
        "hardware.devices_per_node": 1,
        "engine.dtype": "float32",
        "model.dtype": "fp32",
        "search.prompt": "compact",
        "search.topk": 8,
        "data.train": "outputs/quickstart/questions/train.parquet",
        "data.batch_size": 96,
        "judge": False,
    }
    assert different(config, expected) == {}
    assert composed("data=world", "data.train=mine.parquet").data.train == Path("mine.parquet")


@pytest.mark.parametrize(("algorithm", "uses"), [("ppo", True), ("grpo", True), ("dapo", False), ("rloo", True)])
def test_the_reference_is_loaded_only_where_a_kl_asks_for_it(algorithm: str, uses: bool) -> None:
    assert composed(f"algorithm={algorithm}").uses_reference is uses


def test_what_is_recorded_of_a_run_holds_no_value_of_the_workers_variables() -> None:
    config = composed("ray.environment={HF_TOKEN: secret}")
    assert config.recorded().ray.environment == {"HF_TOKEN": "***"}
    assert "secret" not in to_yaml(config.recorded())
    assert composed().recorded() == composed()


def test_no_kl_at_all_needs_no_reference() -> None:
    assert not composed("algorithm=ppo", "algorithm.kl_coef=0").uses_reference
    assert composed("algorithm=ppo", "algorithm.kl_coef=0", "algorithm.kl_target=0.1").uses_reference


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("actor.optim.lrr=1", "actor.optim.lr"),
        ("rollout.temprature=1", "rollout.temperature"),
        ("trainer.total_step=3", "trainer.total_steps"),
        ("recipe=s3_8_3_4", "s3_8_3_3"),
        ("algorithm=gpro", "grpo"),
    ],
)
def test_a_misspelt_key_or_choice_fails_with_the_nearest_name(override: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        composed(override)


def main_ppo(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_the_entry_point_prints_the_composed_configuration_and_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = main_ppo("recipe=s3_8_3_3", f"trainer.folder={folder}", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert build(TrainConfig, yaml.safe_load(done.stdout)) == composed("recipe=s3_8_3_3", f"trainer.folder={folder}")
    assert not folder.exists()


def test_the_entry_point_refuses_a_misspelt_key_in_one_line() -> None:
    done = main_ppo("recipe=s3_8_3_3", "actor.optim.lrr=1")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "unknown key 'actor.optim.lrr'; did you mean 'actor.optim.lr'?" in line
