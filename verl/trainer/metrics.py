"""What a step's trajectories say about the policy; named as in s3's trainer where it has a name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from verl.rewards.recall import gold_recall
from verl.types import Role, Stop, Trajectory
from verl.workers.rollout import Sample


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the means over all trajectories that did not fail, and the number of those that did."""
    scored = [sample for sample in samples if not sample.outcome.failed]
    metrics = {"env/failed": float(len(samples) - len(scored)), "env/trajectories": float(len(samples))}
    if not scored:
        return metrics
    metrics |= {f"reward/{name}": value for name, value in part_means(scored).items()}
    metrics |= _spread("reward", [sample.outcome.score for sample in scored])
    metrics |= _outcome_shares(scored)
    metrics |= _groups_with_variance(scored)
    return metrics | trajectory_metrics([sample.trajectory for sample in scored])


def trajectory_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return how the policy searched.

    `valid_rate` is the share of trajectories that finished by themselves without an invalid turn. Per turn:
    `ratio_of_valid_action`, `invalid_actions` (its complement) and `valid_search_rate`, the share that was answered
    by the retriever. Per question: `number_of_actions`, `searches` (also under its published name
    `number_of_valid_search`) and `selected_documents`. `clip_ratio` is the share of trajectories that met the end of
    the context, and of prompts too long to start from. `state_tokens` are those that the policy sampled, `coverage`
    is their share of what follows the prompt. `rejected/KIND` is how many turns per trajectory were not read for a
    reason of that kind (`Turn.fault`), for the protocols that say one.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    stops = Counter(trajectory.stop for trajectory in trajectories)
    recalls = [r for t in trajectories if (r := gold_recall(t.question, t.documents)) is not None]
    count = max(len(trajectories), 1)
    invalid = sum(turn.invalid for turn in turns)
    searches = sum(trajectory.searches for trajectory in trajectories) / count
    refused = sum(trajectory.stop is Stop.LENGTH and not trajectory.turns for trajectory in trajectories)
    sampled = [policy_tokens(trajectory) for trajectory in trajectories]
    after_prompt = sum(len(segment.ids) for trajectory in trajectories for segment in trajectory.segments)
    metrics = {
        "env/number_of_valid_action": (len(turns) - invalid) / count,
        "env/ratio_of_valid_action": (len(turns) - invalid) / max(len(turns), 1),
        "env/finish_ratio": stops[Stop.FINISHED] / count,
        "env/turn_limit_ratio": stops[Stop.TURN_LIMIT] / count,
        "env/length_ratio": stops[Stop.LENGTH] / count,
        "env/valid_rate": _mean([float(trajectory.valid) for trajectory in trajectories]),
        "env/invalid_actions": invalid / max(len(turns), 1),
        "env/valid_search_rate": _mean([float(turn.result is not None) for turn in turns]),
        "env/searches": searches,
        "env/number_of_valid_search": searches,
        "env/selected_documents": sum(len(turn.selected or ()) for turn in turns) / count,
        "env/documents": _mean([float(len(trajectory.documents)) for trajectory in trajectories]),
        "response_length/clip_ratio": (stops[Stop.LENGTH] - refused) / count,
        "prompt_length/clip_ratio": refused / count,
        "state_tokens/total": float(sum(sampled)),
        "state_tokens/coverage": sum(sampled) / max(after_prompt, 1),
    }
    metrics |= _spread("env/number_of_actions", [len(trajectory.turns) for trajectory in trajectories])
    metrics |= _spread("response_length", sampled)
    metrics |= _spread("prompt_length", [len(trajectory.prompt_ids) for trajectory in trajectories])
    rejected = Counter(turn.fault or "other" for turn in turns if turn.fault or turn.note)
    metrics |= {f"env/rejected/{kind}": number / count for kind, number in rejected.items()}
    return metrics | ({"env/gold_recall": _mean(recalls)} if recalls else {})


def policy_tokens(trajectory: Trajectory) -> int:
    """Return the number of tokens that the policy sampled."""
    return sum(len(segment.ids) for segment in trajectory.segments if segment.role is Role.POLICY)


def _outcome_shares(samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of the four GBR cases, under the published names: utility is the gain, gen the accuracy."""
    cases = Counter(
        (int(s.outcome.parts["gain"]), int(s.outcome.parts["accuracy"])) for s in samples if "gain" in s.outcome.parts
    )
    known = ((1, 1), (0, 1), (0, 0), (-1, 0))
    total = cases.total()
    return {f"reward/utility_{u}_gen_{g}": cases[u, g] / total for u, g in known} if total else {}


def _groups_with_variance(samples: Sequence[Sample]) -> dict[str, float]:
    groups: dict[str, set[float]] = defaultdict(set)
    for sample in samples:
        groups[sample.trajectory.question.id].add(sample.outcome.score)
    return {"reward/groups_with_variance": _mean([float(len(scores) > 1) for scores in groups.values()])}


def part_means(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean of every part of the rewards, over those that have it.

    There is an `accuracy` where the generator was asked or the reward has one of its own.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.outcome.parts.items():
            values[name].append(value)
    return {name: _mean(column) for name, column in values.items()}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": _mean(values), f"{name}/max": float(max(values)), f"{name}/min": float(min(values))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
