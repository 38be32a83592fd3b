"""DeepRetrieval's recipes beside the table of its published training scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import pytest

from tests.trainer.test_recipes import RECIPES, composed, different
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig
from verl.config import CONFIG_DIR
from verl.rewards.ndcg import Ndcg
from verl.rewards.registry import combine, resolve
from verl.trainer.config import TrainConfig

QWEN, LLAMA = "Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"
PUBMED, PUBMED_LLAMA = "deepretrieval_pubmed", "deepretrieval_pubmed_32"
NOT_PUBLISHED = {"deepretrieval_base", "deepretrieval_world"}

# What all 28 published scripts have in common.
COMMON: Mapping[str, object] = {
    "algorithm.estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.kl_in_reward": True,
    "algorithm.kl_kind": "k1",
    "algorithm.kl_coef": 0.001,
    "algorithm.kl_target": None,
    "algorithm.critic_warmup": 0,
    "rollout.samples": 1,
    "rollout.eval_temperature": 0.0,
    "rollout.top_p": 1.0,
    "actor.optim.lr": 1e-6,
    "actor.optim.grad_clip": 1.0,
    "actor.optim.schedule": "constant",
    "actor.update.epochs": 1,
    "actor.loss.clip_low": 0.2,
    "actor.loss.clip_high": 0.2,
    "actor.loss.entropy_coef": 0.001,
    "actor.loss.kl_coef": 0.0,
    "critic.optim.lr": 1e-5,
    "critic.optim.grad_clip": 1.0,
    "critic.update.epochs": 1,
    "critic.value_clip": 0.5,
    "actor.model.gradient_checkpointing": True,
    "critic.model.gradient_checkpointing": True,
    "actor.model.param_offload": False,
    "reference.model.param_offload": True,
    "trainer.val_before_train": False,
    "trainer.checkpoint.best_metric": "val/score",
    "data.drop_yes_no": False,
    "data.drop_rag_correct": False,
}


@dataclass(frozen=True)
class Script:
    """A row of the table: what a published script sets, but for `mini`, which is ours where theirs was a defect.

    Attributes:
        init: policy that actor and critic start from; for staged runs `RECIPE@STEP`, of the critic too if `critic` is
            empty.
    """

    init: str
    gpus: int
    tp: int
    batch: int
    mini: int
    micro: int
    prompt: int
    response: int
    temperature: float
    epochs: int
    save: int
    test: int
    reward: str
    topk: int
    task: str = "query"
    reasoning: bool = True
    prefill: bool = True
    critic: str = ""


def literature(init: str, gpus: int, tp: int, epochs: int, save: int, test: int, **more: object) -> Script:
    sizes = (64, 16, 8, 500, 500, 1.0)
    return Script(init, gpus, tp, *sizes, epochs, save, test, "retrieval_recall", 3000, "literature", **more)


def evidence(init: str, gpus: int, response: int, temperature: float = 1.0, **more: object) -> Script:
    sizes = {"batch": 64, "mini": 16, "micro": gpus} | more
    return Script(
        init,
        gpus,
        tp=1,
        prompt=256,
        response=response,
        temperature=temperature,
        epochs=5,
        save=50,
        test=50,
        reward="first_hit_rank",
        topk=3000,
        **sizes,
    )


def beir(epochs: int, save: int, test: int, topk: int, **more: object) -> Script:
    sizes = {"tp": 1, "batch": 64, "mini": 16, "micro": 2} | more
    return Script(
        QWEN,
        2,
        prompt=256,
        response=512,
        temperature=0.6,
        epochs=epochs,
        save=save,
        test=test,
        reward="ndcg",
        topk=topk,
        **sizes,
    )


def msmarco(init: str, response: int, temperature: float, save: int, test: int, task: str = "query") -> Script:
    return Script(init, 2, 1, 64, 16, 2, 256, response, temperature, 5, save, test, "ndcg", 10, task)


def sql(init: str, gpus: int, save: int, test: int) -> Script:
    sizes = (64, 16, gpus, 2048, 512, 0.6, 5)
    # A statement asks no retriever; top-k is the protocol's default.
    return Script(init, gpus, 1, *sizes, save, test, "execution_accuracy", DeepRetrievalConfig().topk, "sql")


BARE = {"reasoning": False, "prefill": False}
SCRIPTS: Mapping[str, Script] = {
    "pubmed": literature(QWEN, 2, 2, 10, 100, 500),
    "pubmed_32": literature(LLAMA, 2, 2, 10, 300, 500),
    "pmd_no_reason": literature(QWEN, 2, 2, 15, 100, 500, **BARE),
    "ctgov": literature(f"{PUBMED}@350", 4, 4, 5, 50, 200, critic=f"{PUBMED}@1200"),
    "ctgov_32": literature(f"{PUBMED_LLAMA}@1200", 4, 1, 10, 100, 500),
    "nq": evidence(QWEN, 2, 512),
    "nq_no_reason": evidence(QWEN, 2, 512, **BARE),
    "tqa_no_reason": evidence(QWEN, 2, 512, **BARE),
    "triviaqa": evidence("deepretrieval_nq@1800", 2, 350, 0.6),
    "squad": evidence("deepretrieval_nq@1800", 6, 350, batch=72, mini=18),
    "squad_no_reason": evidence(QWEN, 4, 350, **BARE),
    "msmarco_start": msmarco(QWEN, 350, 1.0, 51, 50),
    "msmarco": msmarco("deepretrieval_msmarco_start@450", 350, 1.0, 51, 50),
    "msmarco_dense": msmarco(QWEN, 512, 0.6, 20, 20, "dense"),
    "fever": beir(10, 100, 20, 1000),
    "hotpotqa": beir(10, 100, 20, 3000),
    "fiqa": beir(10, 20, 10, 1000),
    "nfcorpus": beir(10, 20, 10, 1000),
    "msmarco_beir": beir(10, 100, 20, 1000, batch=512, mini=128),
    "scifact": beir(100, 50, 10, 50, tp=2, mini=64),  # published mini-batch: 128 of a batch of 64
    "dense_fever": beir(10, 200, 50, 1000, task="dense"),
    "dense_hotpotqa": beir(10, 200, 50, 1000, task="dense"),
    "dense_msmarco_beir": beir(10, 200, 50, 1000, task="dense"),
    "dense_nfcorpus": beir(30, 100, 10, 100, task="dense"),
    "dense_scifact": beir(50, 100, 10, 1000, task="dense", mini=64, micro=4),  # published mini-batch: 128 of 64
    "spider": sql(QWEN, 2, 200, 20),
    "bird": sql("Qwen/Qwen2.5-7B-Instruct", 4, 200, 20),  # published: a local 7B model without a name
    "sql_all": sql("Qwen/Qwen2.5-Coder-3B-Instruct", 4, 40, 40),
}
MISS = {name: (-2.5, -3.0) if name.startswith("squad") else (-3.5, -4.0) for name in SCRIPTS}


def start_of(stage: str, part: str = "") -> str:
    """Return the path of a model that a run starts from: a name, or `RECIPE@STEP`."""
    recipe, found, step = stage.partition("@")
    return f"outputs/{recipe}/checkpoints/step_{int(step):06d}/hf{part}" if found else stage


def expected(script: Script) -> dict[str, object]:
    """Return the keys that a row of the table sets."""
    budget = script.micro // script.gpus * (script.prompt + script.response)
    return {
        **COMMON,
        "model.path": start_of(script.init),
        "engine.model": start_of(script.init),
        "reference.model.path": start_of(script.init),
        "critic.model.path": start_of(script.critic or script.init, "/critic" if "@" in script.init else ""),
        "hardware.device": "cuda",
        "hardware.devices_per_node": script.gpus,
        "hardware.devices_per_engine": script.tp,
        "data.batch_size": script.batch,
        "actor.update.mini_batch_size": script.mini,
        "critic.update.mini_batch_size": script.mini,
        "actor.update.micro_batch_tokens": budget,
        "critic.update.micro_batch_tokens": budget,
        "search.max_prompt_tokens": script.prompt,
        "search.max_generation_tokens": script.response,
        "search.max_context_tokens": script.prompt + script.response,
        "search.task": script.task,
        "search.topk": script.topk,
        "search.reasoning": script.reasoning,
        "search.prefill": script.prefill,
        "rollout.temperature": script.temperature,
        "actor.temperature": script.temperature,
        "trainer.epochs": script.epochs,
        "trainer.checkpoint.save_freq": script.save,
        "trainer.test_freq": script.test,
        "reward.terms": {script.reward: 1.0},
        "search.prompt": "published",
    }


@cache
def recipe(name: str, *overrides: str) -> TrainConfig:
    return composed(f"recipe=deepretrieval_{name}", *overrides)


def test_every_recipe_of_the_family_is_in_the_table() -> None:
    family = {name for name in RECIPES if name.startswith("deepretrieval_")} - NOT_PUBLISHED
    assert family == {f"deepretrieval_{name}" for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_holds_the_published_hyperparameters(name: str) -> None:
    assert different(recipe(name), expected(SCRIPTS[name])) == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_reward_is_the_corrected_one(name: str) -> None:
    term = SCRIPTS[name].reward
    reward = resolve(term, recipe(name).reward)
    assert reward.variant == "corrected"  # type: ignore[attr-defined]
    assert combine(recipe(name).reward).terms[0][:2] == (term, 1.0)
    if term == "first_hit_rank":
        assert (reward.miss, reward.unreadable) == MISS[name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["pubmed", "squad", "fever", "bird"])
def test_one_override_pays_as_released(name: str) -> None:
    term = SCRIPTS[name].reward
    released = recipe(name, f"reward.params.{term}.variant=released")
    assert resolve(term, released.reward).variant == "released"  # type: ignore[attr-defined]
    assert different(released, expected(SCRIPTS[name])) == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_many_documents_are_searched_as_its_reward_looks_at(name: str) -> None:
    config = recipe(name)
    reward = resolve(SCRIPTS[name].reward, config.reward)
    if isinstance(reward, Ndcg):
        source = config.data.train.parent.name
        assert reward.cutoff(f"{source}_train") == reward.cutoff(f"{source}_dense_train") == config.search.topk
        assert reward.cutoff(f"{source}_val") == reward.cutoff(f"{source}_test") == 10
    elif SCRIPTS[name].task != "sql":
        assert reward.topk == config.search.topk  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_batch_divides_and_its_files_say_which_task_it_is(name: str) -> None:
    config = recipe(name)
    assert config.data.batch_size % config.actor.update.mini_batch_size == 0
    assert config.data.train.parent == config.data.validation.parent
    assert config.data.train.is_relative_to("data/deepretrieval")
    assert (config.data.train.name, config.data.validation.name) == ("train.parquet", "validation.parquet")


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if "@" in script.init])
def test_a_staged_run_starts_from_steps_that_the_run_before_keeps(name: str) -> None:
    config = recipe(name)
    for path in (config.model.path, config.critic.model.path):
        found = re.fullmatch(r"outputs/deepretrieval_(\w+)/checkpoints/step_(\d{6})/hf(/critic)?", path)
        assert found
        before = recipe(found[1])
        assert int(found[2]) in before.trainer.checkpoint.keep_steps
        assert before.algorithm.needs_critic and before.trainer.checkpoint.export_hf


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_says_what_is_searched(name: str) -> None:
    config, task = recipe(name), SCRIPTS[name].task
    engine = {"pubmed": "pubmed", "pmd": "pubmed", "ctgov": "ctgov"}.get(name.partition("_")[0])
    assert (config.literature and config.literature.engine) == engine
    assert (config.reward.sql is not None) == (task == "sql")
    paid = {"spider": "spider", "bird": "bird", "sql_all": "source"}.get(name)
    assert paid is None or config.reward.params["execution_accuracy"]["dataset"] == paid
    port = {"query": 4000, "dense": 3000}.get(task)
    assert port is None or config.retriever.url == f"http://127.0.0.1:{port}/retrieve"


def test_only_first_stages_keep_steps_for_others() -> None:
    keeping = {name: recipe(name).trainer.checkpoint.keep_steps for name in SCRIPTS}
    assert {name: steps for name, steps in keeping.items() if steps} == {
        "pubmed": (350, 1200),
        "pubmed_32": (1200,),
        "nq": (1800,),
        "msmarco_start": (450,),
    }


def test_each_file_is_short_and_says_what_it_is() -> None:
    for path in (CONFIG_DIR / "recipe").glob("deepretrieval_*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path.name
        assert lines[0] == "# @package _global_" and lines[1].startswith("# "), path.name
