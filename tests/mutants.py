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
old_logprobs = old_logprobs.detach() => old_logprobs = old_logprobs
torch.where(mask, advantages.detach(), 0.0) => torch.where(mask, advantages, 0.0) => advantages.detach() => advantages.detach() * mask
torch.where(mask, logprobs - old_logprobs, 0.0) => logprobs - old_logprobs => (logprobs - old_logprobs) * mask
torch.where(mask, logprobs - old_logprobs => torch.where(mask, old_logprobs - logprobs
logprobs - old_logprobs, 0.0) => logprobs - old_logprobs, 0.0).clamp(-20, 20) => logprobs - old_logprobs, 0.0).detach()
math.log1p(-clip_low), math.log1p(clip_high) => math.log1p(-clip_high), math.log1p(clip_low)
math.log1p(-clip_low) => -math.log1p(clip_low) => math.log1p(clip_low)
math.log1p(clip_high) => -math.log1p(-clip_high)
math.log1p(-clip_low), math.log1p(clip_high) => -clip_low, clip_high
math.inf if dual_clip is None else math.log(dual_clip) => math.inf
else math.log(dual_clip) => else dual_clip
advantages < 0, => advantages > 0, => advantages <= 0,
log_ratio.clamp(min=log_low, max=log_dual) => log_ratio.clamp(min=log_low) => log_ratio.clamp(max=log_dual)
log_ratio.clamp(min=log_low, max=log_dual) => log_ratio.clamp(min=log_low, max=log_high)
log_ratio.clamp(max=log_high) => log_ratio.clamp(min=log_low, max=log_high) => log_ratio => log_ratio.clamp(max=min(log_high, log_low))
-advantages * bounded.exp() => advantages * bounded.exp() => -advantages * bounded => -bounded.exp()
-advantages * bounded.exp() => -advantages * bounded.exp().detach() * logprobs
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
with torch.no_grad(): => if True:
clip_low: float = 0.2 => clip_low: float = 0.3
clip_high: float = 0.2 => clip_high: float = 0.28
dual_clip: float | None = None => dual_clip: float | None = 3.0
if not 0 <= clip_low < 1: => if not 0 <= clip_low <= 1:
if not clip_high >= 0: => if clip_high < 0:
not dual_clip > 1: => not dual_clip >= 1:
not in (torch.float32, torch.float64) => in ()
"""

EDITS = {
    "masking": MASKING,
    "logprobs": LOGPROBS,
    "kl": KL,
    "advantages": ADVANTAGES,
    "losses": LOSSES,
}


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
        shutil.copy(ROOT / "tests" / f"test_{module}.py", tests)
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
        files = [f"tests/test_{module}.py" for module in order]
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
