"""Trainings from the command line to the export, by every algorithm, and the scripts that start them."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.integration.training_world import (
    QUESTIONS,
    ROOT,
    SAMPLES,
    SEARCHER,
    TRAJECTORIES,
    VALIDATION,
    TrainingWorld,
    finished,
    history,
)
from verl.config import build
from verl.trainer import main_ppo
from verl.trainer.config import TrainConfig
from verl.trajectories import iter_trajectories

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SPREAD = ("mean", "max", "min")
STAGES = ("rollout", "collate", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "sync", "idle")
PUBLISHED = {
    *(f"critic/{name}/{kind}" for name in ("score", "rewards", "advantages") for kind in SPREAD),
    *(f"{name}/{kind}" for name in ("response_length", "prompt_length", "env/number_of_actions") for kind in SPREAD),
    *(f"actor/{name}" for name in ("pg_loss", "pg_clipfrac", "ppo_kl", "entropy_loss", "grad_norm", "lr")),
    *(f"env/{name}" for name in ("finish_ratio", "number_of_valid_action", "ratio_of_valid_action")),
    *("env/number_of_valid_search", "response_length/clip_ratio", "prompt_length/clip_ratio"),
    *(f"timing_per_token_ms/{stage}" for stage in ("rollout", "ref", "update_actor")),
    *(f"reward/utility_{u}_gen_{g}" for u, g in ((1, 1), (0, 1), (0, 0), (-1, 0))),
    *("state_tokens/total", "state_tokens/coverage", "critic/kl"),
}
CRITIC = {
    "critic/kl_coeff",  # of the KL in the reward
    *(f"critic/{name}/{kind}" for name in ("returns", "values") for kind in SPREAD),
    *(f"critic/{name}" for name in ("vf_loss", "vf_clipfrac", "vpred_mean", "vf_explained_var", "grad_norm", "lr")),
}
OURS = {
    *(f"env/{name}" for name in ("valid_search_rate", "invalid_actions", "searches", "selected_documents")),
    *(f"env/{name}" for name in ("gold_recall", "valid_rate", "failed", "trajectories")),
    *(f"reward/{name}" for name in ("mean", "accuracy", "baseline_accuracy", "gain")),
    *(f"rollout/{name}" for name in ("logprob_diff_mean", "logprob_diff_max", "staleness", "tokens_per_second")),
    *("rollout/search_wait_share", "rollout/reward_wait_share"),
    *(f"timing_s/{stage}" for stage in (*STAGES, "step")),
}
VALIDATED = {"val/accuracy", "val/score", "val/n", "val/failed", "val/accuracy/1-hop", "val/accuracy/2-hop"}


@pytest.fixture(scope="module")
def grpo(prepared: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the quickstart's recipe."""
    folder = tmp_path_factory.mktemp("grpo")
    done = finished(prepared.command(folder, "trainer.val_before_train=true"))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ppo(prepared: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of the published recipe through its script, on the embedded world."""
    folder = tmp_path_factory.mktemp("ppo")
    script = ["bash", "scripts/train/train_s3.sh", "7", "hardware=cpu", "model=tiny", "data=world"]
    mini = [f"{name}.update.mini_batch_size={TRAJECTORIES // 2}" for name in ("actor", "critic")]
    done = finished([*script, *prepared.sizes(folder), *mini, "trainer.total_steps=1"])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class TestGrpo:
    def test_metrics(self, grpo: Path) -> None:
        untrained, first, last = history(grpo)
        assert [row["step"] for row in (untrained, first, last)] == [0, 1, 2]
        for row in (first, last):
            assert row.keys() >= PUBLISHED | OURS
            assert not CRITIC & row.keys()
            assert None not in row.values()
            assert row["env/trajectories"] == TRAJECTORIES
            assert row["env/failed"] == row["rollout/staleness"] == row["actor/skipped_updates"] == 0
            assert row["rollout/logprob_diff_max"] < 1e-3
        assert (first["actor/lr"], first["critic/kl"]) == (1e-4, 0.0)
        assert last["critic/kl"] != 0
        for row in (untrained, last):
            assert row.keys() >= VALIDATED
            assert (row["val/n"], row["val/failed"]) == (VALIDATION, 0)
        assert not VALIDATED & first.keys()

    def test_stages_add_up_to_the_step(self, grpo: Path) -> None:
        for row in history(grpo)[1:]:
            whole = row["timing_s/step"]
            assert math.isclose(sum(row[f"timing_s/{stage}"] for stage in STAGES), whole, rel_tol=1e-6)
            assert 0 <= row["timing_s/idle"] < 0.05 * whole
            stages = {key for key in row if key.startswith("timing_s/")}
            assert stages == {f"timing_s/{stage}" for stage in (*STAGES, "step")}

    def test_dumps(self, grpo: Path) -> None:
        for step in (1, 2):
            played = list(iter_trajectories(grpo / "trajectories" / f"step_{step:06d}.jsonl"))
            asked = [trajectory.question.id for trajectory, _ in played]
            assert {asked.count(name) for name in asked} == {SAMPLES}
            assert len(set(asked)) == QUESTIONS
            scores = [outcome.score for _, outcome in played if outcome]
            assert sum(scores) / len(scores) == pytest.approx(history(grpo)[step]["reward/mean"])
        for step in (0, 2):
            played = list(iter_trajectories(grpo / "validation" / f"step_{step:06d}.jsonl"))
            assert {trajectory.question.id for trajectory, _ in played} == {
                f"world/validation/{index}" for index in range(VALIDATION)
            }

    def test_export(self, grpo: Path) -> None:
        folder = grpo / "checkpoints" / "step_000002" / "hf"
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values())
        base = AutoModelForCausalLM.from_pretrained(SEARCHER).state_dict()
        trained = model.state_dict()
        assert trained.keys() == base.keys()
        moved = max((trained[name].float() - base[name].float()).abs().max().item() for name in base)
        # AdamW moves a weight by about the learning rate in each of its first steps.
        assert 1e-5 < moved < 1e-3
        ids = AutoTokenizer.from_pretrained(folder)("Who is", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()

    def test_report(self, grpo: Path) -> None:
        config = build(TrainConfig, yaml.safe_load((grpo / "config.yaml").read_text()))
        assert (config.trainer.total_steps, config.trainer.folder) == (2, grpo)
        assert (grpo / "report.png").read_bytes().startswith(b"\x89PNG")
        assert "trained_searcher" in (grpo / "report.md").read_text()


class TestPpo:
    def test_metrics(self, ppo: Path) -> None:
        (row,) = history(ppo)
        assert row.keys() >= PUBLISHED | CRITIC | OURS | VALIDATED
        assert (row["actor/updates"], row["critic/updates"]) == (2, 2)
        assert row["critic/vf_loss"] > 0
        assert row["timing_s/idle"] < 0.05 * row["timing_s/step"]

    def test_the_script_is_the_published_recipe(self, ppo: Path) -> None:
        config = build(TrainConfig, yaml.safe_load((ppo / "config.yaml").read_text()))
        assert config.algorithm.estimator == "gae"
        assert (config.search.topk, config.search.max_selected, config.search.max_turns) == (8, 3, 3)
        assert (config.trainer.seed, config.data.seed) == (7, 7)

    def test_actor_and_critic_are_exported(self, ppo: Path) -> None:
        folder = ppo / "checkpoints" / "step_000001" / "hf"
        for kind, place in ((AutoModelForCausalLM, folder), (AutoModel, folder / "critic")):
            _, loading = kind.from_pretrained(place, output_loading_info=True)
            assert not any(loading.values())


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_plus_plus", "dapo"])
@pytest.mark.usefixtures("ray")
def test_further_algorithms(world: TrainingWorld, tmp_path: Path, algorithm: str) -> None:
    overrides = world.overrides(tmp_path, f"algorithm={algorithm}", "trainer.total_steps=1")
    assert main_ppo.main(overrides) == 0
    (row,) = history(tmp_path)
    assert row["actor/updates"] == 1
    assert row["actor/grad_norm"] > 0
    # DAPO draws further questions in the place of those whose samples score alike.
    assert row["env/trajectories"] > TRAJECTORIES if algorithm == "dapo" else row["env/trajectories"] == TRAJECTORIES


SCRIPTS = [
    *sorted((ROOT / "scripts" / "train").glob("*.sh")),
    *sorted((ROOT / "scripts" / "s3_inference").glob("*.sh")),
    ROOT / "scripts" / "evaluation" / "run.sh",
    ROOT / "scripts" / "precompute.sh",
]
NEEDED = {
    "train.sh": ["s3_8_3_3"],
    "train_deepretrieval.sh": ["scifact"],
    "sft.sh": ["exsearch_warmup"],
    "evaluate.sh": ["8-3-3"],
    "run.sh": ["contexts.rag=outputs/contexts/rag"],
    "precompute.sh": ["questions=in.parquet", "output=out.parquet", "split=train"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_dry_run(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, arguments = recorded(script, [*NEEDED.get(script.name, ()), "--cfg", "job"], tmp_path)
    assert importlib.import_module(module).main(arguments) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    if module == "verl.trainer.main_ppo":
        assert (composed["trainer"]["seed"], composed["hardware"]["device"]) == (42, "cuda")
    if script.parent.name == "s3_inference":
        assert (composed["sampling"]["seed"], composed["sampling"]["temperature"]) == (42, 0)


def test_dry_run_as_a_user_does_it() -> None:
    done = finished(["bash", "scripts/train/train_s3.sh", "3", "--cfg", "job"])
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["trainer"]["seed"] == 3


def test_inference_and_scoring_by_the_scripts(grpo: Path, world: TrainingWorld, tmp_path: Path) -> None:
    tiny = ["engine.kind=hf", "engine.dtype=float32", "engine.max_model_len=1024", "search.prompt=compact"]
    tiny += [f"search.max_{name}_tokens={n}" for name, n in (("prompt", 400), ("context", 1000), ("generation", 64))]
    done = finished(
        ["bash", "scripts/s3_inference/evaluate-3-3-3.sh", *tiny, f"retriever.url={world.retriever.url}/retrieve"],
        MODEL=str(grpo / "checkpoints" / "step_000002" / "hf"),
        QUESTIONS=str(world.files.questions("validation")),
        OUTPUT=str(tmp_path / "contexts"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    generator = [f"base_url={world.generator.url}/v1", "max_prompt_tokens=900", "max_tokens=48"]
    contexts = f"contexts.s3={tmp_path / 'contexts'}"
    done = finished(
        ["bash", "scripts/evaluation/run.sh", contexts, *(f"generator.{setting}" for setting in generator)],
        OUTPUT=str(tmp_path / "report"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["methods"]["s3"]
    assert (figures["n"], figures["failed"]) == (VALIDATION, 0)
    # The same model, questions and greedy sampling as the run's last validation.
    assert figures["accuracy"] == history(grpo)[-1]["val/accuracy"]


def recorded(script: Path, arguments: Sequence[str], folder: Path) -> tuple[str, list[str]]:
    """Run a script with an interpreter that only notes what it is asked; return the module and its arguments."""
    notes, interpreter = folder / "notes", folder / "python"
    interpreter.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$NOTES"\n')
    interpreter.chmod(0o755)
    env = {**os.environ, "PYTHON": str(interpreter), "NOTES": str(notes)}
    subprocess.run(["bash", str(script), *arguments], env=env, check=True, timeout=60)
    flag, module, *rest = notes.read_text().split("\0")[:-1]
    assert flag == "-m"
    return module, rest
