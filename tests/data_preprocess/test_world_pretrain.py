"""The tiny model's initialisation, its batches, its loss and its schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from data_preprocess.world import pretrain as pretrain_module
from data_preprocess.world.lessons import Lesson
from data_preprocess.world.pretrain import (
    FACT_WEIGHT,
    PretrainConfig,
    accumulate,
    fill,
    learning_rate,
    lesson_loss,
    pack,
    pretrain,
    save_model,
    tiny_model,
)
from data_preprocess.world.tokenizer import train_tokenizer

FIRST = Lesson([5, 6, 7, 8], [False, False, True, True], [False, False, False, True])
SECOND = Lesson([9, 10], [False, True], [False, False])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return tiny_model(tokenizer, seed=0)


def first_layer_attention(model: Qwen2ForCausalLM, length: int = 200) -> Tensor:
    """(heads, length, length): who looks where in layer 0, on random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, output_attentions=True).attentions[0][0]


def test_the_heads_of_layer_zero_look_back_by_their_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer, seed=1)
    attention = first_layer_attention(model)
    for head in range(4):
        offset = head + 1
        at_offset = attention[head].diagonal(-offset)
        assert at_offset.mean() > 0.85, "the random weights only blur it"
    for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        nn.init.zeros_(projection.weight)
    attention = first_layer_attention(model)
    for head in range(4):
        offset = head + 1
        looked_at = attention[head, offset:].argmax(dim=-1)
        assert torch.equal(looked_at, torch.arange(200 - offset)), "the biases alone say exactly where to look"


def test_the_model_is_small_untied_and_follows_from_its_seed(
    tokenizer: PreTrainedTokenizerFast, model: Qwen2ForCausalLM
) -> None:
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    again, other = tiny_model(tokenizer, seed=0), tiny_model(tokenizer, seed=1)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_lessons_are_padded_to_the_right_and_only_what_is_learned_has_labels() -> None:
    ids, labels, facts = pack([FIRST, SECOND], pad=0)
    assert ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]
    assert facts.tolist() == [[False, False, False, True], [False] * 4]


class Fixed(nn.Module):
    """A "model" whose next-token logits depend on the present token alone, by a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.lm_head = nn.Identity()

    def model(self, input_ids: Tensor) -> Fixed:
        """Look the logits up."""
        self.last_hidden_state = self.table[input_ids]
        return self


def test_the_loss_weighs_looked_up_facts_more() -> None:
    # After 6 comes 7 with probability 1/2, after 7 comes 8 with 1/4, after 9 comes 10 with 1/8.
    table = torch.full((12, 12), -1e9)
    for before, after, probability in ((6, 7, 0.5), (7, 8, 0.25), (9, 10, 0.125)):
        table[before, after], table[before, 0] = math.log(probability), math.log(1 - probability)
    loss, right = lesson_loss(Fixed(table), *pack([FIRST, SECOND], pad=0))
    expected = math.log(2) + FACT_WEIGHT * math.log(4) + math.log(8)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert right.item() == 0, "the one fact's best guess is 0, not 8"
    table[7, 8] = 0.0
    assert lesson_loss(Fixed(table), *pack([FIRST, SECOND], pad=0))[1].item() == 1


def test_a_step_averages_over_all_its_lessons_however_they_are_cut(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> tuple[float, float, Tensor]:
        model.zero_grad()
        loss, right = accumulate(model, [FIRST, SECOND, FIRST], pad=0)
        return loss, right, model.lm_head.weight.grad.clone()

    loss, right, gradient = step()
    whole, _ = lesson_loss(model, *pack([FIRST, SECOND, FIRST], pad=0))
    model.zero_grad()
    (whole / (3 + 2 * FACT_WEIGHT)).backward()
    assert loss == pytest.approx(whole.item() / (3 + 2 * FACT_WEIGHT), rel=1e-5) and right in (0.0, 1.0)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)
    monkeypatch.setattr(pretrain_module, "MICRO_BATCH_TOKENS", 1)
    cut = step()
    assert cut[0] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(cut[2], gradient)


def test_padding_and_what_is_not_learned_do_not_reach_the_loss(model: Qwen2ForCausalLM) -> None:
    alone = lesson_loss(model, *pack([SECOND], pad=0))[0]
    other = Lesson([*SECOND.ids, 11, 12], [*SECOND.learned, False, False], [False] * 4)
    torch.testing.assert_close(lesson_loss(model, *pack([other], pad=0))[0], alone)
    longer = Lesson([1] * 9, [False] * 9, [False] * 9)
    torch.testing.assert_close(lesson_loss(model, *pack([SECOND, longer], pad=3))[0], alone)


def test_the_rate_warms_up_holds_and_decays_to_zero() -> None:
    config = PretrainConfig(learning_rate=1.0, warmup_steps=4, decay=0.5)
    assert [learning_rate(config, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [learning_rate(config, 100, done) for done in (0.5, 0.75, 1.0)] == [1, 0.5, 0]
    assert learning_rate(PretrainConfig(learning_rate=1.0, decay=0.0), 100, 0.999) == 1


def test_a_step_is_filled_up_to_its_tokens() -> None:
    assert [len(fill(lambda: FIRST, tokens)) for tokens in (1, 4, 5, 9)] == [1, 1, 2, 3]


def test_pretraining_learns_and_its_checkpoint_loads_as_any_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(tokenizer, seed=2)
    lessons = [FIRST, SECOND]
    before = lesson_loss(model, *pack(lessons, tokenizer.pad_token_id))[0].item()
    config = PretrainConfig(tokens=150, learning_rate=3e-3, warmup_steps=1)
    pretrain(model, tokenizer, config, tmp_path, draw=lambda maker, level: lessons)
    assert lesson_loss(model, *pack(lessons, tokenizer.pad_token_id))[0].item() < before / 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype is torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    save_model(loaded, tokenizer, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
