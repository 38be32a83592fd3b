"""Every configuration that could not run is refused before a process starts, with the fix in the message."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.fakes import question
from tests.workers.tiny import tiny_model, tiny_tokenizer
from verl.config import compose
from verl.errors import ConfigError
from verl.rewards.registry import RewardConfig
from verl.trainer import preflight
from verl.trainer.config import RolloutConfig, RunConfig, TrainConfig
from verl.types import Baseline, Question

ASKED = [replace(question(name), baseline=Baseline((), "?", False)) for name in "AB"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights, with 1024 positions and untied embeddings."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def composed(model: Path, *overrides: str) -> TrainConfig:
    """The quickstart's configuration on the given model and the hf engine."""
    return compose("train", ["recipe=quickstart", f"model.path={model}", "engine.kind=hf", *overrides], TrainConfig)


def refused(model: Path, *overrides: str, questions: Sequence[Question] = ASKED) -> str:
    """Return the message that refuses the configuration."""
    with pytest.raises(ConfigError) as error:
        preflight.check(composed(model, *overrides), questions)
    return str(error.value)


def test_what_can_run_is_let_through(model: Path) -> None:
    preflight.check(composed(model), ASKED)
    preflight.check(composed(model, "recipe=quickstart_ppo"), ASKED)
    preflight.check(composed(model, "recipe=s3_8_3_3", "hardware=cpu", "data=world"), ASKED)


@pytest.mark.parametrize("recipe", ["s3_8_3_3", "s3_1.5b", "s3_5_3_4", "s3_grpo"])
def test_published_recipes_run_on_the_embedded_world_by_one_override(model: Path, recipe: str) -> None:
    preflight.check(composed(model, f"recipe={recipe}", "hardware=cpu", "data=world"), ASKED)


@pytest.mark.parametrize(
    ("overrides", "came", "fix"),
    [
        (["actor.update.mini_batch_size=50"], "does not divide the 128 trajectories", "choose a divisor"),
        (["rollout.samples=1"], "algorithm.estimator=grpo compares samples", "set it to at least 2"),
        (
            ["algorithm.estimator=reinforce_plus_plus", "rollout.samples=1", "algorithm.dynamic_sampling=2"],
            "drops questions whose samples score alike",
            "dynamic_sampling to 0",
        ),
        (
            ["algorithm.kl_target=0.1", "algorithm.kl_horizon=20"],
            "too short for 128 trajectories a step",
            "raise it above 25.6",
        ),
        (["actor.temperature=0.5"], "actor.temperature=0.5 differs", "make them equal"),
        (["reference.temperature=0.5"], "reference.temperature=0.5 differs", "make them equal"),
        (["engine.max_model_len=512"], "exceeds engine.max_model_len=512", "raise the engine's"),
        (["engine.max_model_len=4096"], "exceeds the 1024 positions", "take a model with a longer context"),
        (
            ["hardware.device=cuda", "rollout.mode=async"],
            "rollout.mode=async rolls out while it trains",
            "set hardware.colocate=false",
        ),
        (["engine.model=elsewhere"], "engine.model=elsewhere differs", "set model.path alone"),
    ],
)
def test_each_mistake_is_told_with_what_came_and_the_fix(
    model: Path, overrides: list[str], came: str, fix: str
) -> None:
    message = refused(model, *overrides)
    assert came in message
    assert fix in message


def test_the_critic_counts_only_where_there_is_one(model: Path) -> None:
    preflight.check(composed(model, "critic.update.mini_batch_size=50"), ASKED)
    assert "critic.update.mini_batch_size=50" in refused(model, "algorithm=ppo", "critic.update.mini_batch_size=50")


def test_all_mistakes_are_told_at_once(model: Path) -> None:
    message = refused(model, "rollout.samples=1", "actor.temperature=0.5", "engine.max_model_len=512")
    assert message.count("; also: ") == 2


def test_more_gpus_than_there_are(model: Path) -> None:
    there = torch.cuda.device_count()
    message = refused(model, "hardware.device=cuda", f"hardware.devices_per_node={there + 1}")
    assert f"hardware.devices_per_node={there + 1} GPUs, but this machine has {there}" in message
    assert "set ray.address" in message
    preflight.check(
        composed(model, "hardware.device=cuda", f"hardware.devices_per_node={there + 1}", "ray.address=auto"), ASKED
    )


@pytest.mark.parametrize(("content", "cause"), [(None, "it is not a folder"), ("{}", "no Hugging Face model")])
def test_a_model_that_is_not_there(tmp_path: Path, content: str | None, cause: str) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    message = refused(folder)
    assert cause in message
    assert "give a model folder or hub name" in message


def test_a_model_without_a_chat_template_or_with_a_damaged_tokenizer(model: Path, tmp_path: Path) -> None:
    config = (model / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert "use an instruct model" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "its tokenizer does not load" in refused(tmp_path)


def test_the_vllm_engine_and_its_conditions(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        assert "set engine.kind=hf" in refused(model, "engine.kind=vllm")
    message = refused(model, "engine.kind=vllm", "engine.tensor_parallel_size=2")
    assert "engine.tensor_parallel_size=2 differs from hardware.devices_per_engine=1" in message
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, tied=True).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "untie the embeddings" in refused(tmp_path, "engine.kind=vllm")
    preflight.check(composed(tmp_path), ASKED)


def test_a_tracker_that_is_not_installed(model: Path) -> None:
    for backend in ("wandb", "tensorboard"):
        override = f"tracking.backends=[{backend}]"
        if importlib.util.find_spec(backend) is None:
            assert f"pip install {backend}" in refused(model, override)
        else:
            preflight.check(composed(model, override), ASKED)


def test_a_literature_service_has_bounds_and_wants_dates(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = ["search.topk=20000", "literature.engine=pubmed"]
    message = refused(model, *asked)
    assert "search.topk=20000 exceeds the 9999 records that pubmed gives for a query; lower it" in message
    dated = replace(ASKED[0], extra={"pub_date": "2015/03/01"})
    preflight.check(composed(model, "literature.engine=pubmed"), [dated, ASKED[1]])
    assert "1 of 2 questions have no extra.pub_date" in caplog.text
    caplog.clear()
    message = refused(model, "retriever.ids_only=true")
    assert "retriever.ids_only=true, but gain may read the documents' texts" in message
    by_ids = replace(composed(model, "retriever.ids_only=true"), reward=RewardConfig({"ndcg": 1.0}))
    preflight.check(by_ids, ASKED)
    preflight.check(composed(model, "literature.engine=ctgov"), ASKED)
    preflight.check(composed(model), ASKED)
    assert "pub_date" not in caplog.text


def test_a_question_without_its_baseline(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 of 3 questions have no naive-RAG baseline.*world/C.*precompute"):
        preflight.check(composed(model), [*ASKED, question("C")])


def test_a_reward_without_a_baseline_needs_none(model: Path) -> None:
    preflight.check(composed(model, "reward.terms={recall_of_gold: 1.0}", "~reward.terms.gain"), [question("C")])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (RolloutConfig, {"samples": 0}),
        (RolloutConfig, {"in_flight": 0}),
        (RolloutConfig, {"temperature": 0.0}),
        (RolloutConfig, {"eval_temperature": -1.0}),
        (RolloutConfig, {"top_p": 0.0}),
        (RunConfig, {"folder": Path("x"), "total_steps": 0}),
        (RunConfig, {"folder": Path("x"), "epochs": 0}),
        (RunConfig, {"folder": Path("x"), "total_steps": None}),
        (RunConfig, {"folder": Path("x"), "max_restarts": -1}),
    ],
)
def test_values_out_of_range_are_refused(kind: type, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="="):
        kind(**wrong)


def test_greedy_evaluation_is_greedy() -> None:
    rollout = RolloutConfig(temperature=0.6, top_p=0.95)
    assert rollout.evaluation(3).temperature == 0
    assert rollout.evaluation(3).top_p == 1
    assert (rollout.training(3).temperature, rollout.training(3).top_p, rollout.training(3).seed) == (0.6, 0.95, 3)


def test_databases_and_golds_are_looked_for(model: Path, tmp_path: Path) -> None:
    extra = {"db_id": "toy", "sql": "SELECT 1"}
    asked = [replace(item, source="spider", extra=extra) for item in ASKED]
    sql = ["reward.terms={execution_accuracy: 1.0}", f"reward.sql.databases={tmp_path}"]
    preflight.check(composed(model, *sql), asked)
    assert "no extra.sql" in refused(model, *sql)
    assert "is no folder; name the folder of the databases" in refused(
        model, *sql[:1], f"reward.sql.databases={tmp_path / 'gone'}", questions=asked
    )
    assert "sql.databases" in refused(model, *sql[:1], questions=asked), "no databases at all"
