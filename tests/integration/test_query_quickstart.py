"""DeepRetrieval on the embedded world, small: every stage for real, then everything reused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_preprocess.world.rewording import RewordingConfig
from verl.config import compose
from verl.trainer.query_quickstart import BASE, BASE_SAMPLED, RAW, TRAINED, QueryQuickstartConfig, query_quickstart

pytestmark = pytest.mark.integration


def test_every_stage_runs_and_is_reused(tmp_path: Path) -> None:
    config = QueryQuickstartConfig(
        output=tmp_path,
        world=RewordingConfig(train=64, validation=8, test=24),
        train={
            "recipe": "deepretrieval_world",
            "engine": {"kind": "hf"},
            "data": {"batch_size": 4},
            "rollout": {"samples": 4},
            "trainer": {"total_steps": 2, "test_freq": 0, "checkpoint": {"save_freq": 2}},
            "hardware": {"threads_per_worker": 1},
        },
    )
    report = query_quickstart(config)
    methods = report["methods"]
    assert list(methods) == [RAW, BASE, BASE_SAMPLED, TRAINED]
    assert all(0 <= figures["recall"] <= 1 and figures["n"] == 24 for figures in methods.values())
    assert methods[BASE]["valid"] > 0.9
    assert json.loads((tmp_path / "report.json").read_text())["methods"].keys() == methods.keys()
    assert "recall@5" in (tmp_path / "report.md").read_text()
    steps = [json.loads(line) for line in (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [0, 1, 2] and "reward/recall" in steps[1]
    assert not any("accuracy" in name for row in steps for name in row), "no generator was asked"
    again = query_quickstart(config)
    assert again["methods"].keys() == methods.keys()
    assert again["stages"]["training"] == report["stages"]["training"], "the training was reused"


def test_the_packaged_recipe_is_what_the_script_runs() -> None:
    config = compose("query_quickstart", ["seed=2"], QueryQuickstartConfig)
    assert config.world.seed == 2 and config.train["recipe"] == "deepretrieval_world"
