"""The E-step's halves and the weighing, from scripted trajectories to files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.exsearch.fakes import (
    END,
    GONE,
    SEARCH,
    SEARCH_CONFIG,
    TOKENIZER,
    Scripted,
    play,
    question,
    tiny_model,
)
from verl.errors import DataError
from verl.trainer.exsearch.config import SamplingConfig, ScoringConfig, WeightsConfig
from verl.trainer.exsearch.files import EpochFiles, Provenance, read_config, read_json, read_trajectories
from verl.trainer.exsearch.sample import Environment, SamplingFailed, sample, slice_of
from verl.trainer.exsearch.score import AnswerScorer, answer_ids, context_of, entropy_stage, golds_of, reason_against
from verl.trainer.exsearch.weigh import Maker, format_stage
from verl.trainer.sft_data import read_examples
from verl.types import Question

SCORING = ScoringConfig(dtype="fp32", answer_prefix=" ", max_tokens=900)
BELONGS = {"questions": "Q", "tokenizer": "T", "model": "M"}
GOOD = ("<QUERY> a", "<FACT> e1\n<QUERY> b", "<FACT> e2\n<FINAL>", " Rome")
SHORT = ("<QUERY> a", "<FACT> e1\n<FINAL>", " Oslo")


def files(folder: Path) -> EpochFiles:
    return EpochFiles(folder / "epo1", 1, "train", "base", 0, 2)


def script(text: str, number: int) -> Sequence[str | Exception]:
    """Question 1: good, short, gone. Question 2: all gone."""
    return {"Who is 1?": (GOOD, SHORT, (GONE,)), "Who is 2?": ((GONE,),) * 3}[text][number]


async def sampled(folder: Path, engine: Scripted, asked: Sequence[Question], share: float = 0.9, **parameters: str):
    config = SamplingConfig(samples=3, max_failed_share=share)
    around = Environment(SEARCH_CONFIG, engine, SEARCH, TOKENIZER)
    return await sample(asked, around, config, 0, files(folder), {**BELONGS, **parameters})


async def test_failures_are_counted_and_stay_in_the_denominators(tmp_path: Path) -> None:
    asked = [question(1, "Rome"), question(2, "Oslo")]
    counts = await sampled(tmp_path, Scripted(script), asked)
    assert counts == {"questions": 2, "trajectories": 6, "failed": 4, "all_failed": 1}
    published = read_json(files(tmp_path).inference)
    assert published["score"]["em"] == pytest.approx(100 / 6, abs=1e-3)  # one of six, not one of two
    assert [(row["query_id"], row["trajectory"]) for row in published["output"]] == [("t/1", 0), ("t/1", 1), ("t/1", 2)]
    assert published["output"][0]["pred"] == "Rome"
    assert published["output"][0]["answer"] == "Rome"
    assert published["output"][0]["messages"][-2]["content"].startswith("Answer.")
    errors = [json.loads(line) for line in (tmp_path / "epo1" / "errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["t/2"]


async def test_a_cut_off_e_step_repeats_nothing_and_tries_dead_questions_again(tmp_path: Path) -> None:
    asked = [question(1), question(2)]
    await sampled(tmp_path, Scripted(script), asked)
    again = Scripted(lambda text, number: {"Who is 2?": SHORT}[text])
    counts = await sampled(tmp_path, again, asked)
    assert counts == {"questions": 2, "trajectories": 6, "failed": 1, "all_failed": 0}
    assert again.calls == 3 * len(SHORT)
    third = Scripted(lambda text, number: ())
    await sampled(tmp_path, third, asked)
    assert third.calls == 0
    with pytest.raises(DataError, match="other parameters: tokenizer"):
        await sampled(tmp_path, third, asked, tokenizer="another")


async def test_too_many_failures_stop_the_stage_and_keep_the_rest(tmp_path: Path) -> None:
    with pytest.raises(SamplingFailed, match=r"4 of 6 trajectories failed .67%, allowed 50%"):
        await sampled(tmp_path, Scripted(script), [question(1), question(2)], share=0.5)
    assert files(tmp_path).journal.is_file()
    assert not files(tmp_path).inference.exists()


def test_iterations_take_the_next_questions_and_begin_anew() -> None:
    assert [slice_of(10, 4, epoch) for epoch in (1, 2, 3)] == [(0, 4), (4, 8), (0, 4)]
    assert slice_of(3, None, 2) == (0, 3)
    assert slice_of(3, 7, 1) == (0, 3)


async def test_every_rule_has_its_reason() -> None:
    asked = question(1, "Rome")
    golds = golds_of(asked, TOKENIZER, SCORING)
    assert reason_against(await play(asked, *GOOD), golds, SCORING) == ""
    assert reason_against(await play(asked, GONE), golds, SCORING) == "failed"
    empty = await play(asked, "<QUERY> a", "<FACT>\n<QUERY> b", "<FACT>\n<QUERY> a", "<FACT>\n<FINAL>", " Rome")
    assert reason_against(empty, golds, SCORING) == "empty_facts"
    assert reason_against(empty, golds, ScoringConfig(max_empty_facts=3)) == ""
    nothing = golds_of(question(1, " ", ""), TOKENIZER, SCORING)
    assert nothing.ids == ()
    assert reason_against(await play(asked, *GOOD), nothing, SCORING) == "empty_gold"
    whole = await play(asked, *GOOD)
    room = len(context_of(whole)) + len(golds.ids[0]) + 1
    assert reason_against(whole, golds, ScoringConfig(answer_prefix=" ", max_tokens=room)) == ""
    assert reason_against(whole, golds, ScoringConfig(answer_prefix=" ", max_tokens=room - 1)) == "too_long"


async def test_log_probabilities_equal_a_plain_forward_pass(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    asked = question(1, "Rome is here", "Oslo")
    trajectories = [await play(asked, *GOOD), await play(asked, *SHORT)]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = []
    for trajectory in trajectories:
        for gold in (" Rome is here", " Oslo"):
            context, answer = list(context_of(trajectory)), TOKENIZER.encode(gold, add_special_tokens=False)
            with torch.no_grad():
                logprobs = plain(torch.tensor([context + answer])).logits[0].log_softmax(dim=-1)
            expected.append(sum(float(logprobs[len(context) + i - 1, token]) for i, token in enumerate(answer)))
    scorer = AnswerScorer(model, ScoringConfig(dtype="fp32", micro_tokens=400), "cpu")
    rows = [
        (context_of(trajectory), answer_ids(gold, TOKENIZER, SCORING))
        for trajectory in trajectories
        for gold in asked.answers
    ]
    assert scorer.logprobs([*rows, rows[0]]) == pytest.approx([*expected, expected[0]], abs=1e-4)
    assert scorer.logprobs([]) == []


async def weighed(folder: Path, weights: WeightsConfig, scoring: ScoringConfig = SCORING):
    """Sample by script, score with a random model, weigh."""
    asked = [question(1, "Rome", "Roma"), question(2)]
    await sampled(folder, Scripted(script), asked)
    scorer = AnswerScorer(tiny_model(folder / "model"), scoring, "cpu")
    counts = entropy_stage(files(folder), scorer, TOKENIZER, scoring, BELONGS)
    return counts, format_stage(files(folder), Maker(TOKENIZER, SEARCH_CONFIG, scoring, weights), BELONGS)


async def test_rows_hold_the_sampled_tokens_the_gold_answer_and_the_weights(tmp_path: Path) -> None:
    counts, found = await weighed(tmp_path, WeightsConfig())
    assert counts == {"scored": 2, "failed": 1, "not_finite": 0}
    entropy = read_json(files(tmp_path).entropy)
    assert [row["reason"] for row in entropy] == ["", "", "failed"]
    sums = [row["sum_logprob"] for row in entropy[:2]]
    assert [row["log_probs"] for row in entropy[:2]] == pytest.approx(
        [-total / row["tokens"] for total, row in zip(sums, entropy, strict=False)]
    )
    highest = max(sums)
    scaled = [math.exp(value - highest) for value in sums]
    expected = [value / sum(scaled) for value in scaled]

    rows = [json.loads(line) for line in files(tmp_path).rows.read_text().splitlines()]
    assert [row["weight"] for row in rows] == pytest.approx(expected, abs=1e-9)
    assert sum(row["weight"] for row in rows) == pytest.approx(1.0, abs=1e-9)
    _, trajectory, _ = next(iter(read_trajectories(files(tmp_path).trajectories)))
    gold = [*TOKENIZER.encode(f" {entropy[0]['gold']}", add_special_tokens=False), TOKENIZER.eos_token_id]
    assert rows[0]["input_ids"] == [*context_of(trajectory), *gold]
    learned = [token for token, mark in zip(rows[0]["input_ids"], rows[0]["loss_mask"], strict=True) if mark]
    policy = [token for line in GOOD[:-1] for token in TOKENIZER.encode(line + END, add_special_tokens=False)]
    assert learned == [*policy, *gold]

    published = read_json(files(tmp_path).training(2))
    assert [math.exp(-row["prob"]) for row in published] == pytest.approx(expected)
    assert published[0]["messages"][-1] == {"role": "assistant", "content": entropy[0]["gold"]}
    assert read_config(files(tmp_path).training(2)) == BELONGS
    assert found["reasons"] == {"scored": 2, "failed": 1}
    assert (found["examples"], found["rows"], found["dead_questions"]) == (2, 2, 0)
    examples = read_examples(files(tmp_path).rows, TOKENIZER)
    assert [example.weight for example in examples] == pytest.approx(expected)


async def test_the_predicted_answer_can_stay_and_rejection_keeps_the_accurate(tmp_path: Path) -> None:
    _, found = await weighed(tmp_path, WeightsConfig(kind="rejection", answer="predicted"))
    rows = [json.loads(line) for line in files(tmp_path).rows.read_text().splitlines()]
    assert [(row["trajectory"], row["weight"]) for row in rows] == [(0, 1.0)]
    assert rows[0]["input_ids"][-2:] == TOKENIZER.encode(" Rome" + END, add_special_tokens=False)[-2:]
    assert found["accurate"] == 1


async def test_equal_trajectories_merge_into_one_row_of_their_weight(tmp_path: Path) -> None:
    asked = [question(1, "Rome")]
    await sampled(tmp_path, Scripted(lambda text, number: (GOOD, GOOD, SHORT)[number]), asked)
    scorer = AnswerScorer(tiny_model(tmp_path / "model"), SCORING, "cpu")
    entropy_stage(files(tmp_path), scorer, TOKENIZER, SCORING, BELONGS)
    kinds = {}
    for merge in (False, True):
        maker = Maker(TOKENIZER, SEARCH_CONFIG, SCORING, WeightsConfig(merge=merge))
        found = format_stage(files(tmp_path), maker, BELONGS)
        rows = [json.loads(line) for line in files(tmp_path).rows.read_text().splitlines()]
        kinds[merge] = [row["weight"] for row in rows]
        assert (found["examples"], found["rows"]) == (3, len(rows))
        assert len(read_json(files(tmp_path).training(3))) == 3
    assert kinds[True] == pytest.approx([kinds[False][0] + kinds[False][1], kinds[False][2]])


async def test_trajectories_that_do_not_explain_the_answer_can_go_without_weight(tmp_path: Path) -> None:
    await weighed(tmp_path, WeightsConfig())
    likely = sorted(math.exp(row["sum_logprob"]) for row in read_json(files(tmp_path).entropy)[:2])
    between, above = sum(likely) / 2, (likely[1] + 1) / 2

    def formatted(least: float):
        maker = Maker(TOKENIZER, SEARCH_CONFIG, SCORING, WeightsConfig(min_probability=least))
        return format_stage(files(tmp_path), maker, BELONGS)

    found = formatted(between)
    assert (found["improbable"], found["rows"], found["reasons"]) == (1, 1, {"scored": 2, "failed": 1})
    (row,) = [json.loads(line) for line in files(tmp_path).rows.read_text().splitlines()]
    assert row["weight"] == 1.0
    with pytest.raises(DataError, match=r"has a weight .*2 below weights.min_probability"):
        formatted(above)
    with pytest.raises(ValueError, match=r"min_probability=1; expected from 0 to below 1"):
        WeightsConfig(min_probability=1)


async def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    await weighed(tmp_path, WeightsConfig())
    path = files(tmp_path).entropy
    kept = read_json(path)
    path.write_text(json.dumps(kept[1:]))
    with pytest.raises(DataError, match="question 't/1', trajectory 0 is in one only"):
        format_stage(files(tmp_path), Maker(TOKENIZER, SEARCH_CONFIG, SCORING, WeightsConfig()), BELONGS)
    path.write_text(json.dumps([*kept, kept[0]]))
    with pytest.raises(DataError, match="trajectory 0 twice"):
        format_stage(files(tmp_path), Maker(TOKENIZER, SEARCH_CONFIG, SCORING, WeightsConfig()), BELONGS)
    mine = Provenance("Q", "T", "M")
    mine.check(asdict(mine), path)
    with pytest.raises(DataError, match="belongs to another tokenizer"):
        mine.check({**asdict(mine), "tokenizer": "X"}, path)
    with pytest.raises(DataError, match="belongs to another question set"):
        mine.check({}, path)


async def test_without_any_weight_the_stage_says_why(tmp_path: Path) -> None:
    asked = [question(1, "Bergen")]
    await sampled(tmp_path, Scripted(lambda text, number: GOOD), asked)
    scorer = AnswerScorer(tiny_model(tmp_path / "model"), SCORING, "cpu")
    entropy_stage(files(tmp_path), scorer, TOKENIZER, SCORING, BELONGS)
    maker = Maker(TOKENIZER, SEARCH_CONFIG, SCORING, WeightsConfig(kind="rejection"))
    with pytest.raises(DataError, match=r"no trajectory .* has a weight .*'scored': 3.*weights.kind=rejection"):
        format_stage(files(tmp_path), maker, BELONGS)
