"""The outer loop's decisions, its configuration, and a whole small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.exsearch.fakes import MODEL, question, tiny_model
from verl.config import CONFIG_DIR, compose
from verl.errors import ConfigError, DataError
from verl.trainer.exsearch.__main__ import STAGES, main
from verl.trainer.exsearch.config import SelfTrainConfig, WorldRun
from verl.trainer.exsearch.outer import Iteration, Policy, best_of, out_of_patience, self_train
from verl.trainer.exsearch.report import history_row
from verl.trainer.exsearch.stages import label_of, sft_config
from verl.trainer.exsearch.task import warm_up_questions, with_prefix
from verl.trainer.stages import Done

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "self_train_recipe").glob("*.yaml"))


def composed(*overrides: str) -> SelfTrainConfig:
    return compose("self_train", overrides, SelfTrainConfig)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_with_its_fine_tunings(recipe: str) -> None:
    config = composed(f"self_train_recipe={recipe}")
    for settings in (config.sft, config.align):
        tuned = sft_config(settings, str(MODEL), Path("out"), {"data.train": Path("rows.jsonl")})
        assert (tuned.model.path, tuned.trainer.folder, tuned.data.train) == (
            str(MODEL),
            Path("out"),
            Path("rows.jsonl"),
        )
        assert tuned.data.max_length >= min(config.scoring.max_tokens, 1000)
    assert config.engine.max_model_len >= config.search.max_context_tokens


def test_the_published_values() -> None:
    paper, released = composed("self_train_recipe=exsearch"), composed("self_train_recipe=exsearch_v1")
    assert (paper.sampling.temperature, paper.sampling.top_p, paper.sampling.samples) == (0.8, 0.95, 8)
    assert (paper.search.topk, paper.search.shown, paper.search.max_turns) == (10, 3, 20)
    assert (paper.weights.kind, released.weights.kind, released.sampling.samples) == ("paper", "released_v1", 1)
    align = sft_config(paper.align, "m", Path("out"), {})
    assert (align.loss.reduction, align.data.weighting, align.optim.lr) == ("sequence_mean", "given", 2e-6)
    assert sft_config(released.align, "m", Path("out"), {}).loss.reduction == "released_v1"


def test_one_trajectory_cannot_be_normalised() -> None:
    with pytest.raises(ConfigError, match="all of them would be 1"):
        composed("self_train_recipe=exsearch", "sampling.samples=1")
    assert composed("self_train_recipe=exsearch", "sampling.samples=1", "weights.kind=reward").sampling.samples == 1


def test_patience_counts_iterations_without_a_new_best() -> None:
    assert not out_of_patience([0.1, 0.2, 0.2], 2)
    assert out_of_patience([0.1, 0.2, 0.2, 0.1], 2)
    assert out_of_patience([0.3, 0.2], 1)
    assert not out_of_patience([0.3], 1)
    assert not out_of_patience([0.3, 0.2, 0.1], 0)


def iteration(epoch: int, em: float) -> Iteration:
    policy = Policy(epoch, f"iteration_{epoch}", "m", Done("align", "f", 0.0, None))
    return Iteration(policy, {"em": em, "f1": em, "recall_at": {"1": 0.5}}, None)


def test_the_best_is_the_earliest_of_equal_ones() -> None:
    found = [iteration(0, 0.1), iteration(1, 0.4), iteration(2, 0.4), iteration(3, 0.3)]
    assert best_of(found, composed("self_train_recipe=exsearch")).policy.epoch == 1
    assert history_row(found[1]) == {"step": 1, "dev/em": 0.4, "dev/f1": 0.4, "dev/recall_at/1": 0.5}


def test_models_are_named_by_their_folder_in_the_run() -> None:
    assert label_of("outputs/run/epo1/align/model") == "epo1"
    assert label_of("outputs/run/sft/model") == "sft"
    assert label_of("Qwen/Qwen2.5-7B-Instruct") == "Qwen2.5-7B-Instruct"


def test_the_answers_prefix_goes_before_answers_alone(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Rome"}]
    rows.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk, "kind": "rank"}) + "\n")
    written = with_prefix(rows, " ", tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][-1]["content"] for line in written] == [" Rome", "Rome"]
    assert with_prefix(rows, "", tmp_path / "other.jsonl") == rows
    rows.write_text("{}\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*expected an object with messages"):
        with_prefix(rows, " ", tmp_path / "out.jsonl")


def test_the_warm_up_may_hold_few_questions_of_two_hops() -> None:
    kinds = ("2-hop", "1-hop", "2-hop", "2-hop", "1-hop", "1-hop")
    asked = [replace(question(number), kind=kind) for number, kind in enumerate(kinds)]
    all_kinds = warm_up_questions(asked, WorldRun(warmup=4))
    assert [one.kind for one in all_kinds] == list(kinds[:4])
    few = warm_up_questions(asked, WorldRun(warmup=4, warmup_two_hop=1))
    assert few == [asked[0], asked[1], asked[4], asked[5]]
    with pytest.raises(ValueError, match="warmup_two_hop=-1; expected 0 or more"):
        WorldRun(warmup_two_hop=-1)


def test_a_stage_has_a_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["infrence"]) == 2
    assert "did you mean 'inference'" in capsys.readouterr().err
    monkeypatch.setenv("PROCEDURE", "formate")
    assert "formate" in STAGES
    assert main(["--cfg", "job"]) == 0
    assert "epoch: 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_world_runs_through_and_a_second_run_repeats_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "policy")
    config = composed(
        "self_train_recipe=exsearch_world",
        f"output={tmp_path / 'run'}",
        f"policy={model}",
        "engine.kind=hf",
        "world.world={seed: 0, train: 8, validation: 4, test: 4}",
        "world.warmup=4",
        "sampling.questions=4",
        "sampling.samples=2",
        "weights.min_probability=0",  # a model of random weights explains nothing
        "search.max_turns=2",
        "loop.iterations=1",
        "sft.trainer.epochs=1",
    )
    report = self_train(config)
    assert list(report["methods"]) == ["warm_up", "iteration_1", "exsearch"]
    assert report["methods"]["iteration_1"]["n"] == 4
    assert sum(report["esteps"]["iteration_1"]["format"]["reasons"].values()) == 8
    for name in ("report.md", "report.png", "metrics.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    again = self_train(config)
    assert set(again["reused"]) >= {"sft", "inference_1", "entropy_1", "format_1", "align_1", "dev_1", "test_1"}
    assert again["methods"] == report["methods"]
