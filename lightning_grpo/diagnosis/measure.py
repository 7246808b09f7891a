"""From scored completions to a diagnosis."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lightning_grpo.advantages import group_statistics
from lightning_grpo.dead_groups import common_group_size, dead_again, dead_bounds, dead_shares
from lightning_grpo.diagnosis.advice import advice_of
from lightning_grpo.diagnosis.histogram import histogram
from lightning_grpo.diagnosis.records import (
    Diagnosis,
    Estimate,
    Groups,
    Lengths,
    Parsing,
    Prompts,
    PromptSample,
    Rewards,
    Sample,
    Truncation,
)
from lightning_grpo.diagnosis.scores_file import ScoredRows
from lightning_grpo.intervals import clustered_share_interval, jackknife_interval
from lightning_grpo.reward_quality import ranking, rescoring_noise
from lightning_grpo.separability import largest_gain, reward_variance

_NUM_PROMPTS_SHOWN = 4
_NUM_SAMPLES_SHOWN = 3


def diagnose_rows(
    rows: ScoredRows, *, source: str = "", group_size: int | None = None, level: float = 0.9
) -> Diagnosis:
    """Measure everything that scored completions can say.

    Args:
        rows: the completions.
        source: their name.
        group_size: of the training that is thought of, >= 2; that of the file when None.
        level: of all intervals, (0, 1).

    Returns:
        The diagnosis, with advice.

    Raises:
        ValueError: a group size below 2, or a level out of range.
    """
    if group_size is not None and group_size < 2:
        raise ValueError(
            f"--group_size {group_size}: a completion alone has no siblings: 2 or more"
        )
    r, ids = rows.rewards, rows.group_ids
    statistics = group_statistics(r, ids)
    num_rows = torch.bincount(ids)
    prompts = _prompts(rows, num_rows)
    found = Diagnosis(
        source=source,
        columns=rows.columns,
        level=level,
        num_completions=len(r),
        num_prompts=len(rows.names),
        num_single=int((num_rows == 1).sum()),
        rewards=_rewards(rows, level),
        prompts=prompts,
        groups=_groups(rows, group_size, level) if bool((num_rows > 1).any()) else None,
        noise=rescoring_noise(rows.scores, ids, level=level) if rows.scores.shape[1] > 1 else None,
        ranking=ranking(r, rows.gold, ids, level=level) if rows.gold is not None else None,
        lengths=_lengths(rows, level),
        truncation=_truncation(rows, level),
        parsing=_parsing(rows, level),
        worst=_samples(rows, prompts, statistics.mean, sign=1),
        best=_samples(rows, prompts, statistics.mean, sign=-1),
        advice=[],
    )
    return replace(found, advice=advice_of(found))


def mean_estimate(values: Tensor, group_ids: Tensor, level: float) -> Estimate:
    """The mean of a column, with the interval of a jackknife over prompts.

    Args:
        values: (B,) NaN where a row has none.
        group_ids: (B,).
        level: of the interval.

    Returns:
        The estimate.
    """
    sums, counts = _sums(values, group_ids)
    total, count = sums.sum(), counts.sum()
    interval = jackknife_interval(total / count, (total - sums) / (count - counts), level=level)
    return Estimate(float(total / count), interval, int(count))


def share_estimate(flags: Tensor, group_ids: Tensor, level: float) -> Estimate:
    """The share of a column that is 1, with an interval over prompts.

    Args:
        flags: (B,) 1 or 0, NaN where it is not known.
        group_ids: (B,).
        level: of the interval.

    Returns:
        The estimate.
    """
    sums, counts = _sums(flags, group_ids)
    interval = clustered_share_interval(sums, counts, level=level)
    return Estimate(float(sums.sum() / counts.sum()), interval, int(counts.sum()))


def _sums(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of what is not NaN, of each prompt that has such."""
    is_known = ~values.isnan()
    _, index = torch.unique(group_ids[is_known], return_inverse=True)
    num_groups = int(index.max()) + 1 if len(index) else 0
    known = values[is_known].double()
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    return zeros.index_add(0, index, known), zeros.index_add(0, index, torch.ones_like(known))


def _rewards(rows: ScoredRows, level: float) -> Rewards:
    r = rows.rewards
    return Rewards(
        mean=mean_estimate(r, rows.group_ids, level),
        smallest=float(r.min()),
        largest=float(r.max()),
        is_binary=len(r.unique()) <= 2,
        histogram=histogram(r.tolist()),
    )


def _prompts(rows: ScoredRows, num_rows: Tensor) -> Prompts:
    statistics = group_statistics(rows.rewards, rows.group_ids)
    means, is_equal = torch.zeros(len(num_rows)).double(), torch.zeros(len(num_rows)).bool()
    means[rows.group_ids] = statistics.mean
    is_equal[rows.group_ids] = statistics.is_equal
    values = sorted(set(rows.rewards.tolist()))
    ticks = None
    if len(values) == 2 and len(num_rows.unique()) == 1 and int(num_rows[0]) <= 16:
        # A pass rate out of G can only be one of these, whether or not a prompt has it.
        low, high, size = values[0], values[1], int(num_rows[0])
        ticks = [low + (high - low) * k / size for k in range(size + 1)]
    return Prompts(
        names=rows.names,
        num_rows=num_rows.tolist(),
        mean_rewards=means.tolist(),
        has_spread=(~is_equal).tolist(),
        histogram=histogram(means.tolist(), ticks),
    )


def _groups(rows: ScoredRows, group_size: int | None, level: float) -> Groups:
    r, ids = rows.rewards, rows.group_ids
    has_siblings = torch.bincount(ids)[ids] > 1
    r, ids = r[has_siblings], ids[has_siblings]
    size = common_group_size(r, ids)
    planned = group_size or size
    smaller = sorted({2, 3, *(g for g in range(4, size) if g <= 16 or g % 8 == 0), size, planned})
    larger = {2 * size, 4 * size, *(planned * factor for factor in (1, 2, 4, 8))}
    again = {}
    if size >= 3:
        # What is best is the largest reward of the file, up to rounding.
        best = float(r.max() - 1e-6 * r.abs().max())
        again["easy"] = dead_again(r, ids, size, at_least=best, level=level)
        again["hard"] = dead_again(r, ids, size, below=best, level=level)
    return Groups(
        num_prompts=len(ids.unique()),
        group_size=size,
        planned_size=planned,
        dead=dead_shares(r, ids, [g for g in smaller if g <= size], level=level),
        beyond=dead_bounds(r, ids, size, sorted(g for g in larger if g > size), level=level),
        easy=again.get("easy"),
        hard=again.get("hard"),
        variance=reward_variance(r, ids, level=level),
        largest_gain=largest_gain(planned),
        alike=_alike(rows, level),
    )


def _alike(rows: ScoredRows, level: float) -> Estimate | None:
    """Share of pairs with the same text, in groups without spread below the best reward."""
    if rows.completions is None:
        return None
    r, ids = rows.rewards, rows.group_ids
    statistics = group_statistics(r, ids)
    is_best = r >= r.max() - 1e-6 * r.abs().max()
    stuck = statistics.is_equal & (statistics.count > 1) & ~is_best
    texts: dict[int, Counter[str]] = {}
    for row in stuck.nonzero().flatten().tolist():
        texts.setdefault(int(ids[row]), Counter())[rows.completions[row]] += 1
    same = [sum(math.comb(n, 2) for n in counts.values()) for counts in texts.values()]
    pairs = [math.comb(counts.total(), 2) for counts in texts.values()]
    return Estimate(
        value=sum(same) / sum(pairs) if pairs else math.nan,
        interval=clustered_share_interval(
            torch.tensor(same, dtype=torch.float64),
            torch.tensor(pairs, dtype=torch.float64),
            level=level,
        ),
        num_rows=sum(pairs),
    )


def _lengths(rows: ScoredRows, level: float) -> Lengths | None:
    if rows.num_tokens is not None:
        values = rows.num_tokens
    elif rows.completions is not None:
        values = torch.tensor([len(text) for text in rows.completions], dtype=torch.float64)
    else:
        return None
    known = values[~values.isnan()]
    if not len(known):
        return None
    return Lengths(
        unit="characters" if rows.num_tokens is None else "tokens",
        mean=mean_estimate(values, rows.group_ids, level),
        median=float(known.median()),
        longest=float(known.max()),
        histogram=histogram(known.tolist()),
    )


def _truncation(rows: ScoredRows, level: float) -> Truncation | None:
    cut = rows.truncated
    if cut is None or not bool((~cut.isnan()).any()):
        return None
    return Truncation(
        share=share_estimate(cut, rows.group_ids, level),
        reward_of_cut=mean_estimate(
            torch.where(cut == 1, rows.rewards, math.nan), rows.group_ids, level
        ),
        reward_of_whole=mean_estimate(
            torch.where(cut == 0, rows.rewards, math.nan), rows.group_ids, level
        ),
    )


def _parsing(rows: ScoredRows, level: float) -> Parsing | None:
    if rows.parsed is None or not bool((~rows.parsed.isnan()).any()):
        return None
    return Parsing(failures=share_estimate(1 - rows.parsed, rows.group_ids, level))


def _samples(rows: ScoredRows, prompts: Prompts, means: Tensor, *, sign: int) -> list[PromptSample]:
    """The prompts with the lowest (sign 1) or the highest (sign -1) mean reward."""
    order = sorted(range(len(prompts.names)), key=lambda n: sign * prompts.mean_rewards[n])
    found = []
    for group in order[:_NUM_PROMPTS_SHOWN]:
        members = (rows.group_ids == group).nonzero().flatten().tolist()
        ranked = sorted(members, key=lambda row: -float(rows.rewards[row]))
        last = len(ranked) - 1
        num = min(_NUM_SAMPLES_SHOWN, len(ranked))
        picked = [ranked[round(i * last / max(num - 1, 1))] for i in range(num)]
        found.append(
            PromptSample(
                name=prompts.names[group],
                prompt=rows.prompts[group],
                mean_reward=prompts.mean_rewards[group],
                num_rows=prompts.num_rows[group],
                samples=[_sample(rows, row) for row in picked] if rows.completions else [],
            )
        )
    return found


def _sample(rows: ScoredRows, row: int) -> Sample:
    assert rows.completions is not None
    num_tokens = math.nan if rows.num_tokens is None else float(rows.num_tokens[row])
    return Sample(
        text=rows.completions[row],
        reward=float(rows.rewards[row]),
        num_tokens=None if math.isnan(num_tokens) else num_tokens,
        is_truncated=rows.truncated is not None and float(rows.truncated[row]) == 1,
    )
