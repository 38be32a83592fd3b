"""The same fine-tuning on one rank in this process and on two in Ray, packed and not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.trainer.test_sft import config_of, weights
from tests.workers.test_sft import toy_examples
from tests.workers.toys import save_model
from verl.single_controller.cluster import RayConfig
from verl.single_controller.placement import HardwareConfig
from verl.trainer.sft import run_sft
from verl.trainer.sft_config import SftBatchConfig, SftOptimConfig
from verl.trainer.tracking import read_all


@pytest.mark.integration
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    # Tied embeddings are the harder case for sharding; an odd vocabulary does not divide evenly either.
    save_model(tmp_path / "base", "qwen3", tied=True)
    examples = toy_examples(9)
    one = replace(
        config_of(tmp_path / "base", tmp_path / "one", epochs=2),
        optim=SftOptimConfig(lr=1e-4),
        batch=SftBatchConfig(size=5, packing=False),
    )
    two = replace(
        one,
        trainer=replace(one.trainer, folder=tmp_path / "two"),
        batch=SftBatchConfig(size=5, micro_tokens=40, packing=True, row_tokens=40),
        hardware=HardwareConfig(devices_per_node=2),
        ray=RayConfig(object_store_gib=0.25, log_to_driver=False),
    )
    first, second = run_sft(one, examples), run_sft(two, examples)
    assert (first.steps, first.tokens) == (second.steps, second.tokens)
    rows = [read_all(config.trainer.folder / "metrics.jsonl") for config in (one, two)]
    for ours, wanted in zip(*rows, strict=True):
        for name in ("sft/loss", "sft/nll", "sft/grad_norm", "sft/lr"):
            assert ours[name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-4)
    assert_close(weights(first.model), weights(second.model), atol=1e-4, rtol=0)
