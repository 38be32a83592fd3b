from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from tests.workers.toys import KINDS, VOCABULARY, save_model, toy_batch
from verl.errors import CheckpointError, ConfigError
from verl.workers.actor import Actor, ActorConfig
from verl.workers.critic import Critic, CriticConfig
from verl.workers.model import ModelConfig, load_value_model
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Ranks

OPTIM = OptimConfig(lr=3e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_actor_is_the_actor(tmp_path: Path, ranks: Ranks, kind: str, tied: bool) -> None:
    save_model(tmp_path / "base", kind, tied)
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path / "base"), dtype="fp32"), OPTIM), ranks)
    actor.update(toy_batch())
    actor.export_hf(tmp_path / "out", str(tmp_path / "base"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32 and loaded.config.use_cache
    assert loaded.config.architectures == [type(loaded).__name__]
    weights = dict(actor.full_weights())
    assert weights.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(weights[name], value) for name, value in loaded.named_parameters())
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert after.get_vocab() == before.get_vocab() and after.convert_tokens_to_ids("w5") == 5


def test_export_in_the_compute_dtype(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path / "base")
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path / "base"))), ranks)
    actor.export_hf(tmp_path / "out", str(tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == loaded.config.dtype == torch.bfloat16


def test_an_exported_critic_is_the_critic(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path / "base")
    batch = toy_batch()
    critic = Critic(CriticConfig(ModelConfig(str(tmp_path / "base"), dtype="fp32"), OPTIM), ranks)
    for _ in range(3):
        critic.update(batch)
    critic.export_hf(tmp_path / "out", str(tmp_path / "base"))
    again = Critic(CriticConfig(ModelConfig(str(tmp_path / "out"), dtype="fp32"), OPTIM), ranks)
    values = critic.values(batch)
    assert values.any()
    assert torch.equal(again.values(batch), values)


def test_a_head_of_another_width_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    save_file({"head.weight": torch.zeros(1, 3)}, tmp_path / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=r"\(1, 3\); expected \(1, 64\)"):
        load_value_model(ModelConfig(str(tmp_path)))


def test_merged_experts_are_refused(tmp_path: Path, ranks: Ranks) -> None:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path), dtype="fp32")), ranks)
    with pytest.raises(ConfigError, match="mixtral"):
        next(actor.full_weights())
