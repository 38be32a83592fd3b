"""Whole fine-tuning runs of a tiny model in this process, and the recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workers.test_sft import toy_examples
from tests.workers.tiny import save, tiny_model, tiny_tokenizer
from tests.workers.toys import save_model
from verl.config import CONFIG_DIR, build, compose, to_dict
from verl.errors import CheckpointError, ConfigError, DataError
from verl.trainer.checkpoint import CheckpointConfig
from verl.trainer.main_sft import main
from verl.trainer.sft import run_sft
from verl.trainer.sft_config import SftBatchConfig, SftConfig, SftDataConfig, SftOptimConfig, SftRunConfig
from verl.trainer.sft_data import SftExample
from verl.trainer.tracking import read_all
from verl.workers.model import ModelConfig
from verl.workers.optim import learning_rate

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "sft_recipe").glob("*.yaml"))


def config_of(model: Path, folder: Path, **run) -> SftConfig:
    return SftConfig(
        ModelConfig(str(model), dtype="fp32"),
        SftRunConfig(folder, **{"epochs": 3, "report": False, **run}),
        data=SftDataConfig(max_length=64),
        optim=SftOptimConfig(lr=3e-3),
        batch=SftBatchConfig(size=4),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_resumed_run_ends_where_an_unbroken_one_does_to_the_bit(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    examples, checkpoint = toy_examples(10), CheckpointConfig(2, best_metric=None, export_hf=False)
    before = torch.get_rng_state()
    whole = run_sft(config_of(tmp_path / "base", tmp_path / "whole", checkpoint=checkpoint), examples)
    assert torch.equal(torch.get_rng_state(), before) and not torch.distributed.is_initialized()
    assert (whole.steps, whole.examples, whole.skipped_updates) == (9, 10, 0)
    assert whole.tokens == 3 * sum(len(example.input_ids) for example in examples)

    broken = config_of(tmp_path / "base", tmp_path / "broken", checkpoint=replace(checkpoint, keep=9))
    run_sft(broken, examples)
    for step in (6, 8, 9):  # what a kill after step 4 would have left
        for path in (tmp_path / "broken" / "checkpoints").glob(f"step_{step:06d}"):
            path.rename(tmp_path / path.name)
    resumed = run_sft(broken, examples)
    ours, wanted = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert (resumed.loss, resumed.tokens, resumed.steps) == (whole.loss, whole.tokens, whole.steps)
    again = run_sft(broken, examples)  # nothing left to do
    assert (again.steps, again.loss) == (9, whole.loss)

    with pytest.raises(CheckpointError, match="trained on other examples"):
        run_sft(broken, examples[:-1])


def test_chats_are_learned_and_the_model_says_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save(tmp_path / "base", tiny_model(tokenizer), tokenizer)
    said = {"Who?": "Bob", "Where?": "Ada"}
    rows = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in said.items()
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = SftDataConfig(train=tmp_path / "train.json", validation=tmp_path / "train.json", max_length=64)
    config = replace(config_of(tmp_path / "base", tmp_path / "run", epochs=40, report=True, test_freq=20), data=data)
    summary = run_sft(config)
    history = read_all(tmp_path / "run" / "metrics.jsonl")
    validated = {row["step"]: row["val/loss"] for row in history if "val/loss" in row}
    assert sorted(validated) == [0, 20, 40] and validated[40] < 0.1 < validated[0]
    assert summary.validation["loss"] == pytest.approx(validated[40])
    rates = [row["sft/lr"] for row in history if "sft/lr" in row]
    assert rates == [pytest.approx(learning_rate(config.optim_over(40), step)) for step in range(40)]
    assert rates[1] < rates[3] == 3e-3 and rates[-1] < 0.01 * 3e-3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sft"]["steps"] == 40 and (tmp_path / "run" / "report.png").stat().st_size > 1000
    model, loaded = AutoModelForCausalLM.from_pretrained(summary.model), AutoTokenizer.from_pretrained(summary.model)
    for ask, answer in said.items():
        prompt = loaded.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert loaded.decode(found) == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        (None, ConfigError, "data.train is not set"),
        ([SftExample((1, 2), (False, True), 0.0)], DataError, "all 1 examples have weight 0"),
        ([SftExample((1, 2), (False, False))], DataError, "none of 1 examples is left .*1 nothing_learned"),
        ([SftExample(tuple(range(80)), (False, *[True] * 79))], DataError, "1 overlong.*raise data.max_length=64"),
        ([SftExample((1, 500), (False, True))], DataError, "holds token 500; .* vocabulary of 97"),
    ],
    ids=["no_data", "no_weight", "nothing_learned", "overlong", "vocabulary"],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_starts(
    tmp_path: Path, examples: list[SftExample] | None, error: type, message: str
) -> None:
    save_model(tmp_path / "base")
    with pytest.raises(error, match=message):
        run_sft(config_of(tmp_path / "base", tmp_path / "run"), examples)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        run_sft(config_of(tmp_path / "nowhere", tmp_path / "run"), toy_examples())


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_an_example_refuses_a_weight_that_is_none(bad: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number of 0 or more"):
        SftExample((1, 2), (False, True), bad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_its_yaml_can_be_read_back(recipe: str) -> None:
    config = compose("sft", [f"sft_recipe={recipe}"], SftConfig)
    assert build(SftConfig, to_dict(config)) == config


def test_the_recipes_hold_the_published_hyperparameters() -> None:
    def shown(recipe: str) -> tuple:
        c = compose("sft", [f"sft_recipe={recipe}"], SftConfig)
        optim = (c.optim.lr, c.optim.schedule, c.optim.warmup_ratio)
        return (*optim, c.trainer.epochs, c.batch.size, c.hardware.devices, c.data.max_length, c.data.max_samples)

    assert shown("exsearch_warmup") == (2e-6, "cosine", 0.1, 2, 256, 8, 8192, 200_000)
    assert shown("exsearch_warmup_v1") == (2e-6, "cosine", 0.1, 2, 64, 8, 8192, 200_000)
    assert shown("exsearch_align") == (2e-6, "cosine", 0.1, 2, 256, 8, 8192, 300_000)
    assert shown("deepretrieval_sql")[0::3][:2] == (2e-5, 4) and shown("deepretrieval_sql")[4] == 4
    assert shown("s3_sft")[0::3][:2] == (2e-5, 1) and shown("s3_sft")[4] == 4
    align = compose("sft", ["sft_recipe=exsearch_align"], SftConfig)
    assert (align.data.weighting, align.loss.reduction, align.loss.micro_batch) == ("released_v1", "released_v1", 2)
    assert align.model.dtype == "bf16" and align.lora is None


def test_adapters_are_configured_by_their_keys() -> None:
    config = compose("sft", ["lora={rank: 8}", "lora.alpha=16"], SftConfig)
    assert config.lora is not None and (config.lora.rank, config.lora.alpha) == (8, 16.0)


def test_the_entry_point_tells_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lrr=1"]) == 2
    assert "did you mean 'optim.lr'" in capsys.readouterr().err
    save_model(tmp_path / "base")
    words = [f"model.path={tmp_path / 'base'}", "hardware.device=cpu", f"data.train={tmp_path / 'none.jsonl'}"]
    assert main([*words, f"trainer.folder={tmp_path / 'run'}"]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
