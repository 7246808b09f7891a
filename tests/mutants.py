"""Mutation check of the mathematics: break one formula at a time, and see its tests turn red.

    python tests/mutants.py             all mutants, two at a time
    python tests/mutants.py kl losses   those of some modules

Each line `old => new => new ...` below stands for one mutant per `new`: a textual edit of one
module, applied to a copy of the pure modules in a temporary folder, where the tests of those
modules run. A mutant is killed when a test fails. The check itself fails when a mutant survives,
when its text is not found exactly once, or when it cannot even be imported, which would prove
nothing about the tests.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import pytest
import torch  # noqa: F401  imported once here, not once in every fork

ROOT = Path(__file__).resolve().parent.parent
NUM_PARALLEL = 2

MASKING = """
is_eos.cumsum(dim=1) - is_eos) == 0 => is_eos.cumsum(dim=1)) == 0 => is_eos.cumsum(dim=1) - is_eos) <= 1 => is_eos.cumsum(dim=0) - is_eos) == 0
list(eos_token_ids), dtype => list(eos_token_ids)[:1], dtype
attention_mask.long().cumsum(dim=1) - 1) => attention_mask.long().cumsum(dim=1)) => attention_mask.long().cumsum(dim=0) - 1)
.clamp(min=0) => .clamp(min=1)
- 1).clamp(min=0) => - 1)
kept = torch.where(mask, x, 0.0) => kept = x * mask => kept = x => kept = torch.where(mask, 0.0, x)
kept.sum() if dim is None else kept.sum(dim=dim) => kept.sum()
masked_sum(x, mask, dim) / count.clamp(min=1) => masked_sum(x, mask, dim) / count => masked_sum(x, mask, dim)
count = mask.sum() if dim is None else mask.sum(dim=dim) => count = mask.sum()
ones = mask.to(dtype) => ones = torch.ones_like(mask, dtype=dtype) => ones = mask.float()
if reduction != "completion": => if reduction == "completion": => if reduction == "token":
ones / ones.sum(dim=1, keepdim=True).clamp(min=1) => ones / ones.shape[1] => ones / ones.sum(dim=1, keepdim=True)
ones / ones.sum(dim=1, keepdim=True).clamp(min=1) => ones / ones.sum(dim=0).clamp(min=1) => ones / ones.sum().clamp(min=1)
if reduction == "token": => if reduction == "constant":
return mask.sum().to(torch.float64) => return mask.any(dim=1).sum().to(torch.float64) => return torch.tensor(float(mask.numel())).double()
num_rows = mask.any(dim=1).sum() => num_rows = mask.all(dim=1).sum() => num_rows = torch.tensor(mask.shape[0]) => num_rows = mask.any(dim=0).sum()
num_rows * max_completion_tokens if => num_rows * mask.shape[1] if => num_rows if
if reduction == "constant" else num_rows => if reduction == "completion" else num_rows
if max_completion_tokens < 1: => if max_completion_tokens < 0:
masked_sum(weights * per_token, mask) => (weights * per_token).sum()
per_token, mask) / denominator => per_token, mask) => per_token, mask) * denominator => per_token, mask) / denominator / per_token.shape[0]
masked_sum(weights * per_token => masked_mean(weights * per_token => masked_sum(per_token
reduction_weights(mask, reduction, dtype=per_token.dtype) => reduction_weights(mask, reduction)
math.isfinite(denominator) and denominator >= 0 => denominator >= 0 => math.isfinite(denominator)
if bool(mask.any()): => if bool(mask.all()) and False:
denominator = 1.0 => denominator = 0.0
if mask.dtype != torch.bool: => if False:
if tensor.shape != mask.shape: => if tensor.ndim != mask.ndim:
"""

LOGPROBS = """
return chosen - scaled.logsumexp(dim=-1) => return chosen + scaled.logsumexp(dim=-1) => return chosen
return chosen - scaled.logsumexp(dim=-1) => return chosen - scaled.logsumexp(dim=-1).detach() => return chosen - scaled.exp().sum(dim=-1).log()
return chosen - scaled.logsumexp(dim=-1) => return chosen - logits.logsumexp(dim=-1)
chosen = scaled.gather( => chosen = logits.gather(
else wide / temperature => else wide * temperature => else wide => else wide.div_(temperature)
logits if logits.dtype == torch.float64 else logits.float() => logits => logits.float()
return -(logp.exp() * finite_logp) => return (logp.exp() * finite_logp)
logp.exp() * finite_logp => finite_logp => logp.exp() * logp => logp.exp().detach() * finite_logp
finite_logp).sum(dim=-1) => finite_logp).mean(dim=-1)
logp = _scaled(logits, temperature) => logp = _scaled(logits, 1.0)
math.isfinite(temperature) and temperature > 0 => temperature > 0 => math.isfinite(temperature)
"""

KL = """
torch.where(mask, other_logprobs - logprobs, 0.0) => other_logprobs - logprobs => (other_logprobs - logprobs) * mask
torch.where(mask, other_logprobs - logprobs => torch.where(mask, logprobs - other_logprobs => torch.where(~mask, other_logprobs - logprobs
other_logprobs - logprobs, 0.0) => other_logprobs - logprobs.detach(), 0.0) => other_logprobs - logprobs, 0.0).clamp(-20, 20)
return -d => return d => return -d.detach() * logprobs
return d.square() / 2 => return d.square() => return -d.square() / 2 => return d.abs() / 2
return torch.expm1(d) - d => return torch.expm1(-d) + d => return torch.expm1(d) + d => return torch.expm1(d) => return d.exp() - d
return torch.expm1(d) - d => return d.exp() - 1 - d => return (torch.expm1(d) - d).clamp(max=10) => return (torch.expm1(d) - d).detach()
(torch.expm1(d) - d).detach() + => (torch.expm1(d) - d) + => (torch.expm1(d) + d).detach() + => d.square().detach() / 2 +
(k2 - k2.detach()) => (k2 - k2) => (k2 + k2.detach()) => (k2.detach() - k2)
k2 = d.square() / 2 => k2 = d.square() => k2 = -d
error = kl_nats_per_completion / target_nats_per_completion - 1 => error = kl_nats_per_completion - target_nats_per_completion
/ target_nats_per_completion - 1 => / target_nats_per_completion => / target_nats_per_completion + 1
min(max(error, -0.2), 0.2) => error => min(error, 0.2) => max(error, -0.2) => max(min(error, -0.2), 0.2)
beta * (1 + clipped => beta * (1 - clipped => beta + (clipped
clipped * min(1.0, num_completions / horizon_completions) => clipped / horizon_completions
min(1.0, num_completions / horizon_completions) => (num_completions / horizon_completions)
if not math.isfinite(kl_nats_per_completion): => if False: => if kl_nats_per_completion == math.inf:
if not target_nats_per_completion > 0: => if target_nats_per_completion < 0:
if not horizon_completions > 0: => if horizon_completions < 0:
"""

ADVANTAGES = """
(count - 1).clamp(min=1) => count.clamp(min=1) => (count - 1)
deviation.square() => deviation.abs()
deviation.square()) / (count - 1).clamp(min=1) => r.square()) / (count - 1).clamp(min=1)
deviation = torch.where(is_scored, r - mean[index], 0.0) => deviation = r - mean[index]
r - mean[index], 0.0) => r, 0.0)
index_add(0, index, r) / count.clamp(min=1) => index_add(0, index, r) => index_add(0, index, r) / count => index_add(0, index, r) / 4
index_add(0, index, is_scored.to(torch.float64)) => index_add(0, index, torch.ones_like(r))
is_scored = ~rewards.isnan() => is_scored = ~(rewards.isnan() | (rewards == 0))
torch.where(is_scored, rewards.to(torch.float64), 0.0) => rewards.to(torch.float64) => torch.where(is_scored, rewards.to(torch.float64), 1.0)
rewards.to(torch.float64), 0.0) => rewards.to(torch.float32).double(), 0.0)
index[is_scored], r[is_scored] => index, r
"amax", include_self=False) => "amax", include_self=True)
"amin", include_self=False) => "amin", include_self=True)
torch.maximum(largest.abs(), smallest.abs()) => largest.abs() => smallest.abs() => torch.ones_like(largest) => torch.maximum(largest, smallest)
largest - smallest <= EQUAL => largest - smallest < EQUAL => largest - smallest >= EQUAL
EQUAL_RELATIVE_SPREAD = 1e-6 => EQUAL_RELATIVE_SPREAD = 1e-5 => EQUAL_RELATIVE_SPREAD = 5e-7 => EQUAL_RELATIVE_SPREAD = 0.0
std=variance.sqrt() => std=variance
rewards.to(torch.float64) - group.mean => rewards.to(torch.float64) => group.mean - rewards.to(torch.float64)
rewards.to(torch.float64) - group.mean => rewards.to(torch.float64) - rewards.double().nanmean() => rewards.float() - group.mean.float()
advantages * group.count / (group.count - 1).clamp(min=1) => advantages * (group.count - 1) / group.count => advantages * group.count
advantages / (group.std + eps) => advantages / group.std + eps => advantages / (group.std - eps) => advantages / (group.std.square() + eps).sqrt()
advantages / (group.std + eps) => advantages / group.std.clamp(min=eps) => advantages * (group.std + eps)
eps: float = 1e-8 => eps: float = 1e-4
scale: Scale = "std" => scale: Scale = "none"
baseline: Baseline = "group_mean" => baseline: Baseline = "leave_one_out"
if baseline == "leave_one_out": => if baseline == "group_mean":
if scale == "std": => if scale == "none":
torch.where(rewards.isnan() | group.is_equal, 0.0, => torch.where(rewards.isnan(), 0.0, => torch.where(group.is_equal, 0.0,
per_group.is_equal & is_scored => per_group.is_equal
is_scored = per_group.count > 0 => is_scored = per_group.count > 1 => is_scored = per_group.count >= 0
std=per_group.std[index] => std=per_group.mean[index]
if not eps >= 0: => if eps < 0:
if bool(rewards.isinf().any()): => if bool((rewards == torch.inf).any()):
"""

LOSSES = """
logprobs - old_logprobs.detach(), 0.0) => logprobs - old_logprobs, 0.0)
torch.where(mask, advantages.detach(), 0.0) => torch.where(mask, advantages, 0.0) => advantages.detach() => advantages.detach() * mask
torch.where(mask, logprobs - old_logprobs.detach(), 0.0) => logprobs - old_logprobs.detach()
torch.where(mask, logprobs - old_logprobs.detach(), 0.0) => (logprobs - old_logprobs.detach()) * mask
torch.where(mask, logprobs - old_logprobs.detach() => torch.where(mask, old_logprobs.detach() - logprobs
old_logprobs.detach(), 0.0) => old_logprobs.detach(), 0.0).clamp(-20, 20) => old_logprobs.detach(), 0.0).detach()
math.log1p(-clip_low), math.log1p(clip_high) => math.log1p(-clip_high), math.log1p(clip_low)
math.log1p(-clip_low) => -math.log1p(clip_low) => math.log1p(clip_low)
math.log1p(-clip_low), math.log1p(clip_high) => math.log1p(-clip_low), -math.log1p(-clip_high)
math.log1p(-clip_low), math.log1p(clip_high) => -clip_low, clip_high
math.inf if dual_clip is None else math.log(dual_clip) => math.inf
else math.log(dual_clip) => else dual_clip
advantages < 0, => advantages > 0, => advantages <= 0,
log_ratio.clamp(min=log_low, max=log_dual) => log_ratio.clamp(min=log_low) => log_ratio.clamp(max=log_dual)
log_ratio.clamp(min=log_low, max=log_dual) => log_ratio.clamp(min=log_low, max=log_high)
log_ratio.clamp(max=log_high) => log_ratio.clamp(min=log_low, max=log_high) => log_ratio => log_ratio.clamp(max=min(log_high, log_low))
-advantages * bounded.exp() => advantages * bounded.exp() => -advantages * bounded => -bounded.exp()
-advantages * bounded.exp() => -advantages * bounded.exp().detach() * log_ratio
(log_ratio > log_high) => (log_ratio < log_high) => (log_ratio > log_low)
(log_ratio < log_low) => (log_ratio < log_high)
((advantages > 0) & (log_ratio > log_high)) => (log_ratio > log_high)
(advantages > 0) & => (advantages >= 0) &
(advantages < 0) & (log_ratio < log_low) => (log_ratio < log_low)
(advantages < 0) & => (advantages <= 0) &
kl_estimate(old_logprobs, logprobs, mask => kl_estimate(logprobs, old_logprobs, mask
mask, "k3") => mask, "k1") => mask, "k2")
approx_kl.sum(), count => approx_kl.mean(), count
count = mask.sum() => count = torch.tensor(mask.numel())
is_clipped.sum() => is_clipped.float().mean()
@torch.no_grad() => #
clip_low: float = 0.2 => clip_low: float = 0.3
clip_high: float = 0.2 => clip_high: float = 0.28
dual_clip: float | None = None => dual_clip: float | None = 3.0
if not 0 <= clip_low < 1: => if not 0 <= clip_low <= 1:
if not clip_high >= 0: => if clip_high < 0:
not dual_clip > 1: => not dual_clip >= 1:
not in (torch.float32, torch.float64) => in ()
masked_mean(log_ratio.detach(), mask, dim=1).unsqueeze(1) => log_ratio.detach().mean(dim=1).unsqueeze(1)
masked_mean(log_ratio.detach(), mask, dim=1).unsqueeze(1) => masked_mean(log_ratio.detach(), mask)
masked_mean(log_ratio.detach(), mask, dim=1).unsqueeze(1) => log_ratio.detach().sum(dim=1).unsqueeze(1)
masked_mean(log_ratio.detach() => masked_mean(log_ratio
mean + (log_ratio - log_ratio.detach()) => mean => mean + log_ratio => mean - (log_ratio - log_ratio.detach())
_surrogate(sequence, advantages, clip_low, clip_high, None) => _surrogate(log_ratio, advantages, clip_low, clip_high, None)
_check_bounds(clip_low, clip_high, None) => _check_bounds(0.0, 0.0, None)
clip_low: float = 3e-4 => clip_low: float = 4e-4
clip_high: float = 4e-4 => clip_high: float = 3e-4
weight = log_ratio.detach() => weight = log_ratio => weight = -log_ratio.detach()
clamp(max=log_bound).exp() => exp() => exp().clamp(max=log_bound) => clamp(min=-log_bound, max=log_bound).exp()
log_bound = math.log1p(clip_high) => log_bound = math.log(clip_high) => log_bound = clip_high
-weight * advantages * torch.where(mask, logprobs, 0.0) => weight * advantages * torch.where(mask, logprobs, 0.0)
-weight * advantages * torch.where(mask, logprobs, 0.0) => -weight * torch.where(mask, logprobs, 0.0)
-weight * advantages * torch.where(mask, logprobs, 0.0) => -weight * advantages
* torch.where(mask, logprobs, 0.0) => * logprobs => * log_ratio
is_clipped = log_ratio > log_bound => is_clipped = log_ratio < log_bound
is_clipped = log_ratio > log_bound => is_clipped = (log_ratio > log_bound) & (advantages > 0)
clip_high: float = 4.0 => clip_high: float = 5.0
_check_bounds(0.0, clip_high, None) => _check_bounds(0.0, 0.0, None)
"""

INTERVALS = """
tail = (1 - level) / 2 => tail = 1 - level => tail = (1 - level) / 4
high = 1 - _binomial_bound(num_trials - num_successes, => high = 1 - _binomial_bound(num_trials - num_successes + 1, => high = _binomial_bound(num_trials - num_successes,
low = _binomial_bound(num_successes, => low = 1 - _binomial_bound(num_successes,
torch.arange(least, num_trials + 1, => torch.arange(least, num_trials, => torch.arange(least + 1, num_trials + 1,
num_trials + 1, dtype=torch.float64 => num_trials + 1, dtype=torch.float32
math.lgamma(num_trials + 1) - => math.lgamma(num_trials) -
torch.lgamma(k + 1) => torch.lgamma(k)
torch.lgamma(num_trials - k + 1) => torch.lgamma(num_trials - k + 2)
k * math.log(p) => (k - 1) * math.log(p)
(num_trials - k) * math.log1p(-p) => (num_trials - k) * math.log(p)
terms.exp().sum()) < tail => terms.exp().sum()) > tail
_NUM_HALVINGS = 60 => _NUM_HALVINGS = 12
if not 0 <= num_successes <= num_trials => if num_successes > num_trials => if num_successes < 0
if not 0 < level < 1 => if not 0 <= level < 1 => if not 0 < level <= 1 => if not 0 < level
num_groups < 3 or => num_groups < 2 or
num_groups < 3 or not bool(torch.cat([left_out, estimate[None]]) => num_groups < 3 or not bool(torch.cat([left_out])
torch.cat([left_out, estimate[None]]) => torch.cat([estimate[None]])
(left_out - left_out.mean()).square() => left_out.square() => (left_out - left_out.mean()).abs()
* (num_groups - 1) / num_groups => / num_groups => * num_groups / (num_groups - 1)
student_quantile((1 + level) / 2, num_groups - 1) => student_quantile(level, num_groups - 1)
2, num_groups - 1) => 2, num_groups)
* math.sqrt(spread) => * spread
float(estimate) - half_width => float(left_out.mean()) - half_width => float(estimate) + half_width
(z**3 + z) / (4 * n) => (z**3 - z) / (4 * n) => (z**3 + z) / (2 * n)
(5 * z**5 + 16 * z**3 + 3 * z) => (5 * z**5 + 16 * z**3 - 30 * z) => (z**5 + 16 * z**3 + 3 * z)
19 * z**5 + 17 * z**3 - 15 * z) => 17 * z**3 - 15 * z)
"""

SEPARABILITY = """
rows = _scored_rows(rewards, group_ids, at_least=1) => rows = _scored_rows(rewards, group_ids, at_least=2)
count >= at_least => count > at_least
~rewards.isnan() & ( => (
ids[group_statistics(rewards[rows], ids).is_equal].unique() => ids[group_statistics(rewards[rows], ids).is_equal]
num_groups = len(ids.unique()) => num_groups = len(group_ids.unique()) => num_groups = len(ids)
share=num_dead / num_groups if num_groups => share=num_groups / num_dead if num_dead
interval=binomial_interval(num_dead, num_groups, level=level) => interval=binomial_interval(num_dead, num_groups) => interval=binomial_interval(num_groups - num_dead, num_groups, level=level)
r = r - r.min() if len(r) else r => r = r
from_own_mean = r - group_statistics(r, ids).mean => from_own_mean = r - r.mean() => from_own_mean = r
ids, from_own_mean.square(), r => ids, from_own_mean.abs(), r => ids, from_own_mean.square(), r.abs().sqrt()
total.square() / size, total, size => total.square(), total, size => total.square() / size, size, size
size, size.square(), torch.ones_like => size, size, torch.ones_like
_variance_components(sums.sum(0) - sums) => _variance_components(sums)
torch.log1p(group_size * between / within) => torch.log(group_size * between / within) => torch.log1p(between / within)
torch.log1p(group_size * left_between / left_within) => torch.log1p(left_between / left_within) => torch.log1p(group_size * left_between / within)
.expm1().clamp(min=0) / group_size => .expm1().clamp(min=0) => .exp().clamp(min=0) / group_size => .expm1() / group_size
1 - 1 / (1 + ends) => 1 / (1 + ends) => ends
clamped = between.clamp(min=0) => clamped = between => clamped = between.abs()
clamped / (clamped + within) => clamped / within => within / (clamped + within) => between / (between + within)
if math.isfinite(low) else Interval(0.0, 1.0) => if low == 0 else Interval(0.0, 1.0)
num_groups=len(sums) => num_groups=len(r)
num_rows - num_groups) => num_rows - 1) => num_rows)
(ss_means - totals.square() / num_rows) / (num_groups - 1) => (ss_means - totals.square() / num_rows) / num_groups => ss_means / (num_groups - 1) => (ss_means + totals.square() / num_rows) / (num_groups - 1)
(num_rows - squared_sizes / num_rows) / (num_groups - 1) => num_rows / num_groups => (num_rows - squared_sizes / num_rows) / num_groups
(mean_square - within) / group_size => mean_square / group_size => (mean_square - within)
group.count / (group.count - 1) => (group.count - 1) / group.count => (group.count - 1)
(r - group.mean) * group => (r - r.mean()) * group
siblings = float(sibling_residual.square().mean()) => siblings = float(sibling_residual.square().sum()) => siblings = float(sibling_residual.abs().mean())
if not bool(values.isfinite().all()): => if bool(values.isnan().all()): => if not bool(prompt_values.isfinite().all()):
values = prompt_values[rows].double() => values = prompt_values[rows].double() * 0 => values = prompt_values[rows].float().double()
critic_residual = r - values => critic_residual = r + values => critic_residual = values - group.mean
critic_residual.square().mean() => critic_residual.square().sum()
ids, critic_residual.square(), sibling_residual.square() => ids, sibling_residual.square(), critic_residual.square()
total, left_out = sums.sum(0), sums.sum(0) - sums => total, left_out = sums.sum(0), sums
(left_out[:, 0] / left_out[:, 1]).log() => (left_out[:, 0] / left_out[:, 1]) => (left_out[:, 0] / total[1]).log()
torch.float64).exp() => torch.float64).expm1()
ratio=float(total[0] / total[1]) => ratio=float(total[1] / total[0])
variance = (r - r.mean()).square().mean() => variance = r.square().mean() => variance = (r - r.mean()).square().sum() / (len(r) - 1)
explained_var=float(1 - critic / variance) => explained_var=float(critic / variance) => explained_var=float(1 - variance / critic)
return within / (group_size - 1) => return within / group_size => return within * group_size / (group_size - 1)
1 - (1 - icc) * largest_gain => 1 - icc * largest_gain => (1 - icc) * largest_gain
return group_size / (group_size - 1) => return (group_size - 1) / group_size => return group_size
if not group_size > 1: => if group_size < 1: => if not group_size >= 1:
"""

GAE = """
mask.flip(1).cumsum(dim=1).flip(1) == 1 => mask.cumsum(dim=1) == 1 => mask.flip(1).cumsum(dim=1).flip(1) >= 1
is_last = mask & ( => is_last = (
torch.where(is_last, rewards.unsqueeze(1), 0.0) => is_last * rewards.unsqueeze(1) => torch.where(mask, rewards.unsqueeze(1), 0.0)
mask.any(dim=1) & ~rewards.isfinite() => ~rewards.isfinite() => mask.any(dim=1) & rewards.isnan()
scores - beta * kl_estimate => scores + beta * kl_estimate => scores - kl_estimate => scores + 0 * beta * kl_estimate
kl_estimate(old_logprobs, ref_logprobs => kl_estimate(ref_logprobs, old_logprobs
mask, "k1") => mask, "k3") => mask, "k2") => torch.ones_like(mask), "k1")
"k1").to(scores.dtype) => "k1").to(torch.float64)
if not beta >= 0: => if beta < 0:
if old_logprobs is None or ref_logprobs is None: => if old_logprobs is None and ref_logprobs is None:
if mask.ndim != 2 or rewards.shape != mask.shape[:1]: => if mask.ndim != 2 or rewards.shape[0] != mask.shape[0]:
if not 0 <= gamma <= 1: => if gamma < 0: => if not 0 < gamma <= 1: => if gamma > 1:
(rate >= 0) & (rate <= 1) => rate <= 1 => rate >= 0 => (rate >= 0) & (rate < 1) => (rate > 0) & (rate <= 1)
if rate.ndim and rate.shape != (num_rows,): => if False:
dtype=delta.dtype => dtype=torch.float32
final_values = values.new_zeros(num_rows) => final_values = values[:, -1] => final_values = values.new_ones(num_rows)
if final_values.shape != (num_rows,): => if False:
token_rewards + gamma * next_values - values => token_rewards + next_values - values => token_rewards + gamma * (next_values - values)
token_rewards + gamma * next_values - values => token_rewards - gamma * next_values - values => token_rewards + gamma * next_values + values
token_rewards + gamma * next_values - values => gamma * next_values - values => token_rewards - values
torch.where(mask, token_rewards + gamma * next_values - values, 0.0) => token_rewards + gamma * next_values - values
torch.where(mask, token_rewards + gamma * next_values - values, 0.0) => mask * (token_rewards + gamma * next_values - values)
torch.where(mask, gamma * rate.expand(num_rows).unsqueeze(1), 1.0) => (gamma * rate.expand(num_rows).unsqueeze(1)).expand(mask.shape)
gamma * rate.expand => rate.expand => gamma + 0 * rate.expand
.unsqueeze(1), 1.0) => .unsqueeze(1), 0.0)
delta[:, t] + decay[:, t] * following => delta[:, t] - decay[:, t] * following => delta[:, t] => delta[:, t] + following
in reversed(range(mask.shape[1])) => in range(mask.shape[1])
following = delta.new_zeros(num_rows) => following = delta.new_ones(num_rows)
return torch.where(mask, advantages, 0.0) => return advantages => return torch.where(mask, advantages + values, 0.0)
1 - 1 / (alpha * lengths) => 1 + 1 / (alpha * lengths) => 1 - alpha / lengths => 1 / (alpha * lengths)
.clamp(min=0, max=1) => .clamp(max=1) => .clamp(min=0.05, max=1)
lengths = mask.sum(dim=1).to(torch.float64) => lengths = mask.sum(dim=1) => lengths = mask.sum(dim=0).to(torch.float64)
lengths = mask.sum(dim=1).to(torch.float64) => lengths = torch.full((len(mask),), mask.shape[1]).double()
if not alpha > 0: => if alpha <= 0: => if not alpha >= 0:
torch.where(mask, columns, num_columns) => columns.expand(mask.shape)
here.flip(1).cummin(dim=1) => here.cummin(dim=1) => here.flip(1).cummax(dim=1)
torch.cat([from_here, none], dim=1)[:, 1:] => torch.cat([from_here, none], dim=1)[:, :-1] => torch.cat([none, from_here], dim=1)[:, 1:]
"""

WHITENING = """
wide = torch.where(mask, x, 0.0).to(torch.float64) => wide = x.to(torch.float64) => wide = (x * mask).to(torch.float64)
wide = torch.where(mask, x, 0.0).to(torch.float64) => wide = torch.where(mask, x, 0.0)
count, total = sum_over_ranks(torch.stack([mask.sum().to(torch.float64), wide.sum()])) => count, total = mask.sum().to(torch.float64), wide.sum()
mask.sum().to(torch.float64) => torch.tensor(mask.numel()).to(torch.float64)
mean = total / count => mean = total * 0 => mean = total / (count - 1).clamp(min=1)
centered = wide - mean => centered = wide => centered = mean - wide
sum_over_ranks(masked_sum(centered.square(), mask)) => masked_sum(centered.square(), mask)
masked_sum(centered.square(), mask) => centered.square().sum() => masked_sum(centered.abs(), mask) => masked_sum(wide.square(), mask)
(count - 1).clamp(min=1) => count.clamp(min=1) => (count - 1)
.clamp(min=1)).sqrt() => .clamp(min=1))
centered / (std + eps) => centered / std => centered / std + eps => centered / (std * std + eps).sqrt() => centered * (std + eps) => centered
scaled if shift_mean else scaled + mean => scaled => scaled + mean if shift_mean else scaled => scaled if shift_mean else scaled - mean
shift_mean: bool = True => shift_mean: bool = False
eps: float = 1e-8 => eps: float = 1e-4
torch.where(mask, whitened, 0.0).to(x.dtype) => whitened.to(x.dtype) => torch.where(mask, whitened, 0.0)
torch.where(mask, whitened, 0.0).to(x.dtype) => torch.where(mask, whitened, 0.0).float()
if not eps > 0: => if eps <= 0: => if not eps >= 0:
@torch.no_grad() => #
"""

VALUE_LOSS = """
values = torch.where(mask, values, 0.0) => values = values => values = values * mask
targets = torch.where(mask, returns.detach(), 0.0) => targets = returns.detach() => targets = torch.where(mask, returns, 0.0)
old = torch.where(mask, old_values.detach(), 0.0) => old = old_values.detach() => old = torch.where(mask, old_values, 0.0)
error = (values - targets).square() => error = (values - targets).abs() => error = (values - targets).square().detach()
old + (values - old).clamp(-clip, clip) => old + (values - old).clamp(max=clip) => old + (values - old).clamp(min=-clip)
old + (values - old).clamp(-clip, clip) => targets + (values - targets).clamp(-clip, clip) => (values - old).clamp(-clip, clip)
(values - old).abs() > clip) & (clipped_error > error) => (values - old).abs() > clip)
((values - old).abs() > clip) & (clipped_error > error) => ((values - old).abs() > clip) & (clipped_error < error)
((values - old).abs() > clip) & (clipped_error > error) => ((values - old).abs() > clip) & (clipped_error >= 0)
torch.where(is_clipped, clipped_error, error) => clipped_error => error => torch.where(is_clipped, error, clipped_error)
per_token = error / 2 => per_token = error
per_token.detach().sum() => per_token.sum() => per_token.detach().mean()
is_clipped.sum() => is_clipped.float().mean()
count = mask.sum().to(per_token.dtype) => count = torch.tensor(mask.numel())
not in (torch.float32, torch.float64) => in ()
clip is not None and not clip > 0 => clip is not None and clip <= 0 => clip is not None and not clip >= 0
target = torch.where(mask, returns, 0.0).to(torch.float64) => target = returns.to(torch.float64)
target - torch.where(mask, values, 0.0).to(torch.float64) => target - values.to(torch.float64) => target + torch.where(mask, values, 0.0).to(torch.float64)
count = mask.sum().to(torch.float64) => count = torch.tensor(mask.numel()).to(torch.float64)
num_tokens.clamp(min=1) => num_tokens.clamp(min=4)
target - target_sum / num_tokens => target => target - target_sum
residual - residual_sum / num_tokens => residual => residual - residual_sum
torch.stack([target_squares, residual_squares]) => torch.stack([residual_squares, target_squares])
target_spread <= EQUAL_RELATIVE_SPREAD**2 * float(size) => target_spread < EQUAL_RELATIVE_SPREAD**2 * float(size)
target_spread <= EQUAL_RELATIVE_SPREAD**2 * float(size) => target_spread <= 0
EQUAL_RELATIVE_SPREAD = 1e-6 => EQUAL_RELATIVE_SPREAD = 1e-5 => EQUAL_RELATIVE_SPREAD = 2e-7
return 0.0 => return 1.0 => return float("nan")
float(1 - residual_spread / target_spread) => float(residual_spread / target_spread) => float(1 - target_spread / residual_spread)
float(1 - residual_spread / target_spread) => max(float(1 - residual_spread / target_spread), 0.0)
"""

GRADIENT_SUMS = """
if name != "arms" => if name not in ("arms", "norm")
self.next_block + torch.arange(rows.shape[1]) => torch.arange(rows.shape[1])
_own_products(rows, rows)) => _own_products(rows, rows[:1]))
_own_products(rows, rows[:1])) => _own_products(rows, rows))
(self.next_block + len(blocks)) % => (self.next_block + 1) %
self._squares.index_add_(1, blocks => self._squares.index_add_(1, 0 * blocks
pairs.alignment += _products(earlier, now[:1]) => pairs.alignment += _products(now, earlier[:1]) => pairs.alignment += _products(earlier[:1], now)
across = _products(earlier, now) => across = _products(earlier, now[:1])
pairs.norm += across + across.mT => pairs.norm += across
pairs.num_alignment += num_across => pairs.num_alignment += num_across + num_across.T
pairs.num_norm += num_across + num_across.T => pairs.num_norm += num_across
if earlier is None else earlier.add_(now) => if True else earlier
self._num_earlier += self._num_now => self._num_earlier = self._num_now
of_arm.copy_(sum_over_ranks(of_arm)) => sum_over_ranks(of_arm)
pairs.alignment += _products(now, now[:1]) - self._own_alignment.diag_embed() => pairs.alignment += _products(now, now[:1]) => pairs.alignment += _products(now, now) - self._own_alignment.diag_embed()
pairs.norm += _products(now, now) - self._squares.diag_embed() => pairs.norm += _products(now, now) => pairs.norm += _products(now, now[:1]) - self._squares.diag_embed()
torch.outer(self._num_now, self._num_now) - torch.diag(self._num_now) => torch.outer(self._num_now, self._num_now)
pairs.num_alignment += num_pairs => pairs.num_alignment += num_pairs + 1
pairs.squares += self._squares => pairs.squares += self._own_alignment
self.next_block = state["next_block"] => pass
self._num_earlier = state["num_earlier"].clone() => pass
if not bool(rows.isfinite().all()): => if False:
total - sums.sum(-1) - sums.sum(-2) + own => total - sums.sum(-1) - sums.sum(-2) => total - 2 * sums.sum(-1) + own => total - sums.sum(-1) + own
without[..., is_used] => without
"""

GRADIENT_QUALITY = """
_jackknife(alignment / (moments.signal * mean_square).sqrt(), level) => _jackknife(alignment / mean_square.sqrt(), level) => _jackknife(alignment / (moments.signal * mean_square), level)
alignment=float(alignment[0]) => alignment=float(alignment[1])
mean_square=float(mean_square[0]) => mean_square=float(mean_square[1])
signal=float(moments.signal[0]) => signal=float(moments.signal[1])
if not reason and not jackknife_interval(base[0], base[1:], level=level).low > 0: => if not reason and jackknife_interval(base[0], base[1:], level=level).low > 0: => if False:
ratio = moments.alignment[a] / base => ratio = base / moments.alignment[a]
moments.mean_square[b] / moments.mean_square[a] => moments.mean_square[a] / moments.mean_square[b]
if not num_batch_prompts > 0: => if num_batch_prompts < 0:
mean(pairs.squares.diag_embed(), pairs.num_prompts.diag_embed()) => mean(pairs.squares.diag_embed(), pairs.num_norm)
norm = mean(pairs.norm, pairs.num_norm) => norm = mean(pairs.norm, pairs.num_alignment)
signal=norm[0] => signal=norm[-1]
mean(pairs.alignment, pairs.num_alignment) => mean(pairs.alignment, pairs.num_norm)
square * share + norm * (1 - share) => square * share + norm => square * share => norm
num_blocks * whole - (num_blocks - 1) * left_out.mean() => whole
jackknife_interval(corrected, left_out, level=level) => jackknife_interval(corrected, left_out) => jackknife_interval(whole, left_out, level=level)
"" if interval.low > 0 else => "" if interval.high > 0 else => "" if moments.signal[0] > 0 else
min(max(cosine, 0.0), 1.0) ** 2 => min(max(cosine, 0.0), 1.0) => min(abs(cosine), 1.0) ** 2 => max(cosine, 0.0) ** 2
2 * math.log(ratio) if => math.log(ratio) if
"""

ALLOCATION = """
size < _MIN_GROUP_SIZE => size < 3
r = r - r.mean(dim=1, keepdim=True) => r = r
own.unsqueeze(1) - 2 * gram => own.unsqueeze(1) - gram
* distance).sum((1, 2)) / 4 => * distance).sum((1, 2)) / 2
(size * torch.diag_embed(r) - r.unsqueeze(2) + r.unsqueeze(1)) / 2 => (size * torch.diag_embed(r) - r.unsqueeze(2)) / 2 => size * torch.diag_embed(r) - r.unsqueeze(2) + r.unsqueeze(1)
one_common = by_first - same => one_common = by_first
none_common = everything - 4 * one_common - 2 * same => none_common = everything - 4 * one_common - same => none_common = everything - 2 * one_common - 2 * same
none_common / (pairs * (size - 2) * (size - 3)) => none_common / (pairs * (size - 2) * (size - 2))
one_common / (pairs * (size - 2)) => one_common / pairs
same / pairs => same / size
between * size + completion + noise / (size - 1) => between * size + completion + noise / size => between + completion + noise / (size - 1) => between * size + noise / (size - 1)
of_size(size) / of_size(group_size) => of_size(size)
max(2.0, 1 + ratio**-0.5) => 1 + ratio**-1 => ratio**-0.5
if ratio > 0 else math.inf => if ratio > 0 else 2.0
is_noisy = interval(noise).low > 0 => is_noisy = True
ratio = between / noise => ratio = between / completion
Interval(best(high), best(low)) => Interval(best(low), best(high))
if not torch.equal(count.double(), pairs.num_prompts): => if False:
(sums.sum(0) - sums)[used] => sums[used]
(count.sum() - count)[used] => count[used]
completion = 4 * (one_common - square) => completion = 2 * (one_common - square)
noise = 2 * (same - square) - completion => noise = 2 * (same - square)
return square - signal, => return square,
"""

SHADOW_CRITIC = """
states[mask], returns[mask].unsqueeze(1) => states.flatten(0, 1), returns.flatten().unsqueeze(1)
sums.addmm_(z.T, z) => sums = z.T @ z * 2
if not bool(sums.isfinite().all()): => if False:
return bool(self._sums[-2, -2] > 0) => return True
1 - float(self._errors[self._best]) / spread => float(self._errors[self._best]) / spread
rows.double() @ weights[:-1] + weights[-1] => rows.double() @ weights[:-1]
if float(new[-2, -2]) == 0: => if False:
-torch.ones(len(self.ridges), 1) => torch.ones(len(self.ridges), 1)
self._errors = self.decay * self._errors + => self._errors = self._errors +
new[-1, -1] - new[-1, -2].square() / new[-2, -2] => new[-1, -1]
self._spread = self.decay * self._spread + spread => self._spread = self._spread + spread
self._sums = self.decay * self._sums + new => self._sums = self._sums + new => self._sums = new
self._errors = state["errors"].clone() => pass
self._spread = state["spread"].clone() => pass
int(self._errors.argmin()) if => int(self._errors.argmax()) if
/ count - torch.outer(mean, mean) => / count
moment = sums[-1, :-2] / count - mean * mean_return => moment = sums[-1, :-2] / count
torch.where(is_constant, 0.0, variance.clamp(min=0).rsqrt()) => variance.clamp(min=0).rsqrt() => torch.where(is_constant, 0.0, 1.0)
correlation + ridge * torch.eye(len(scale), dtype=torch.float64) => correlation + 1e-4 * torch.eye(len(scale), dtype=torch.float64)
mean_return - mean @ beta => mean_return
"""

EDITS = {
    "masking": MASKING,
    "logprobs": LOGPROBS,
    "kl": KL,
    "advantages": ADVANTAGES,
    "losses": LOSSES,
    "gae": GAE,
    "whitening": WHITENING,
    "value_loss": VALUE_LOSS,
    "intervals": INTERVALS,
    "separability": SEPARABILITY,
    "gradient_sums": GRADIENT_SUMS,
    "gradient_quality": GRADIENT_QUALITY,
    "allocation": ALLOCATION,
    "shadow_critic": SHADOW_CRITIC,
}
# Where the tests of a module do not have its name, and what tests import.
TESTS = {"gradient_sums": "gradient_quality"}
HELPERS = ("enumerable_policy",)


class Mutant(NamedTuple):
    """One textual edit of one module; `old` must occur exactly once."""

    module: str
    old: str
    new: str


def mutants_of(modules: list[str]) -> list[Mutant]:
    """The mutants of some modules, in the order in which they are written above."""
    mutants = []
    for module in modules:
        for line in EDITS[module].strip().split("\n"):
            old, *edits = line.split(" => ")
            mutants += [Mutant(module, old, new) for new in edits]
    return mutants


def copy_and_break(folder: Path, mutant: Mutant | None) -> str:
    """Copy modules and tests, apply the mutant, and return what is wrong with it, or nothing."""
    package, tests = folder / "lightning_grpo", folder / "tests"
    package.mkdir(parents=True)
    tests.mkdir()
    (package / "__init__.py").touch()
    for module in (*EDITS, "types"):
        shutil.copy(ROOT / "lightning_grpo" / f"{module}.py", package)
    for module in EDITS:
        shutil.copy(ROOT / "tests" / f"test_{TESTS.get(module, module)}.py", tests)
    for helper in HELPERS:
        shutil.copy(ROOT / "tests" / f"{helper}.py", tests)
    if mutant is None:
        return ""
    path = package / f"{mutant.module}.py"
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"its text occurs {source.count(mutant.old)} times, not once"
    path.write_text(source.replace(mutant.old, mutant.new))
    return ""


def start_tests(folder: Path, first: str) -> int:
    """Fork a process that runs the tests in a folder, those of one module first; return its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        for module in EDITS:
            importlib.import_module(f"lightning_grpo.{module}")
        order = sorted(EDITS, key=lambda module: module != first)
        files = list(dict.fromkeys(f"tests/test_{TESTS.get(m, m)}.py" for m in order))
        code = pytest.main(["-x", "-q", "-c", os.devnull, "-p", "no:cacheprovider", *files])
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run(mutants: list[Mutant | None], folder: Path) -> list[str]:
    """Outcome of each mutant: killed, SURVIVED, or INVALID with the reason; None stands for no edit."""
    outcomes = [""] * len(mutants)
    waiting = list(range(len(mutants)))
    running: dict[int, int] = {}  # process id -> index of its mutant
    while waiting or running:
        while waiting and len(running) < NUM_PARALLEL:
            i = waiting.pop(0)
            place, mutant = folder / str(i), mutants[i]
            problem = copy_and_break(place, mutant)
            if problem:
                outcomes[i] = f"INVALID: {problem}"
                continue
            running[start_tests(place, mutant.module if mutant else "")] = i
        if running:
            process, status = os.wait()
            i = running.pop(process)
            outcomes[i] = {0: "SURVIVED", 1: "killed"}.get(os.waitstatus_to_exitcode(status), "")
            if not outcomes[i]:
                outcomes[i] = "INVALID: " + (folder / str(i) / "log").read_text()
            shutil.rmtree(folder / str(i))
    return outcomes


def main() -> int:
    """Run the mutants of the modules named on the command line, or all; 0 when every one is killed."""
    modules = sys.argv[1:] or list(EDITS)
    if not set(modules) <= set(EDITS):
        raise SystemExit(f"there are mutants for {', '.join(EDITS)}; name some of these")
    mutants = mutants_of(modules)
    with tempfile.TemporaryDirectory() as folder:
        if run([None], Path(folder, "unbroken")) != ["SURVIVED"]:
            raise SystemExit("the tests fail before anything is broken; mend them first")
        outcomes = run(list(mutants), Path(folder, "broken"))
    for mutant, outcome in zip(mutants, outcomes):
        if outcome != "killed":
            print(f"{mutant.module}: {mutant.old} => {mutant.new}\n    {outcome}")
    print(f"{outcomes.count('killed')} of {len(mutants)} mutants killed")
    return 0 if outcomes.count("killed") == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
