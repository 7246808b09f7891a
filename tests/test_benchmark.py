from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_grpo.benchmark import clock as clock_module
from lightning_grpo.benchmark.clock import StepClock
from lightning_grpo.benchmark.ours import train_ours
from lightning_grpo.benchmark.parity import compare, difference_of, our_step, problems_of, trl_step
from lightning_grpo.benchmark.regimes import SHAPES, Regime, preset_regimes, regimes_of
from lightning_grpo.benchmark.report import Report
from lightning_grpo.benchmark.results import rows_of
from lightning_grpo.benchmark.rooflines import (
    Machine,
    ModelCosts,
    Sizes,
    decode_bytes,
    decode_step_seconds,
    padded_update,
    plain_update,
    rollout_seconds,
    shared_update,
    update_flops,
)
from lightning_grpo.benchmark.sampler_gap import sampler_gaps
from lightning_grpo.benchmark.turns import CONTESTANTS, Result, Worker, run_by_turns
from lightning_grpo.benchmark.workload import (
    bench_tokenizer,
    prompt_rows,
    stopping_ids,
    varied_reward,
    write_model,
)
from lightning_grpo.cli import main
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.tools import benchmark as tool

H200 = Machine(bytes_per_s=4.3e12, flops_per_s=790e12)
CPU = torch.device("cpu")
# Sizes of the published Qwen2.5 models, in bfloat16.
QWEN = {
    "0.5B": ModelCosts(896, 24, 14, 2, 64, 4864, 151936, 2),
    "1.5B": ModelCosts(1536, 28, 12, 2, 128, 8960, 151936, 2),
    "7B": ModelCosts(3584, 28, 28, 4, 128, 18944, 152064, 2),
}
# h = 2, one layer, one head of 2, inner width 3, 5 tokens, a byte per weight:
# N = (2 + 1) * 6 + 2 * 2 + 3 * 2 * 3 + 2 * 2 in the layer + 2 of the last norm + 10 of the head.
SMALL = ModelCosts(2, 1, 1, 1, 2, 3, 5, 1)
TWO_ROWS = Sizes(prompt_tokens=3, group_size=2, lengths=[2, 1])
REGIME = Regime("tiny", "fixed", 8, 6, 2, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "model"
    write_model(folder, REGIME)
    return folder


# Rooflines


@pytest.mark.parametrize(
    ("name", "num_params", "kv_bytes"),
    [
        ("0.5B", 494_032_768, 12_288),
        ("1.5B", 1_543_714_304, 28_672),
        ("7B", 7_615_616_512 - 152_064 * 3584, 57_344),  # its input embedding is a lookup
    ],
)
def test_parameters_and_cache_are_those_of_the_published_models(name, num_params, kv_bytes):
    assert QWEN[name].num_params == num_params
    assert QWEN[name].kv_bytes == kv_bytes


@pytest.mark.parametrize(("name", "seconds"), [("0.5B", 0.501), ("1.5B", 1.265), ("7B", 4.76)])
def test_the_floor_of_decoding_on_an_h200(name, seconds):
    # B = 512, P = 256, C = 512 at the mean context, where the 7B model is bound by arithmetic.
    context = 512 * (256 + 256)
    step = decode_step_seconds(QWEN[name], H200, 512, context, context)
    assert 512 * step == pytest.approx(seconds, rel=5e-3)


def test_decoding_256_rows_of_the_smallest_model_can_reach_424_thousand_tokens_per_second():
    context = 256 * (256 + 256)
    step = decode_step_seconds(QWEN["0.5B"], H200, 256, context, context)
    assert 256 / step == pytest.approx(424e3, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "dense", "shared"), [("0.5B", 1.48, 1.14), ("1.5B", 4.63, 3.40), ("7B", 21.2, 15.05)]
)
def test_the_floor_of_an_update_on_an_h200(name, dense, shared):
    sizes = Sizes(prompt_tokens=256, group_size=16, lengths=[512] * 512)
    costs = QWEN[name]
    plain_s = update_flops(costs, plain_update(sizes)) / H200.flops_per_s
    assert plain_s == pytest.approx(dense, rel=3e-3)
    shared_s = update_flops(costs, shared_update(sizes)) / H200.flops_per_s
    assert shared_s == pytest.approx(shared, rel=3e-3)


def test_a_rollout_reads_weights_and_running_rows_in_every_step():
    # Weights 56 bytes and cache 4 a token: (56 + 4 * 2 * 3) + (56 + 4 * 4), the short row ended.
    assert rollout_seconds(SMALL, Machine(1.0, math.inf), TWO_ROWS) == 152
    assert decode_bytes(SMALL, TWO_ROWS) == 152


def test_a_rollout_multiplies_the_prompt_once_and_each_running_row_in_every_step():
    # 2 * 56 * 3 for the prompt; 2 * 56 * 2 + 8 * 2 * 3; 2 * 56 + 8 * 4.
    assert rollout_seconds(SMALL, Machine(math.inf, 1.0), TWO_ROWS) == 336 + 272 + 144


def test_an_update_counts_tokens_scores_and_squares():
    assert plain_update(TWO_ROWS) == (9, 3, 41)
    assert shared_update(TWO_ROWS) == (6, 3, 32)
    assert padded_update(TWO_ROWS) == (10, 4, 50)


def test_operations_of_an_update_with_and_without_recomputation():
    # 46 weights in the layers, 10 in the head, 2 * L * n_q * d = 4 a pair of the attention.
    assert update_flops(SMALL, plain_update(TWO_ROWS)) == 6 * 46 * 9 + 8 * 10 * 3 + 12 * 41
    recomputed = update_flops(SMALL, plain_update(TWO_ROWS), recomputes=True)
    assert recomputed == 8 * 46 * 9 + 8 * 10 * 3 + 16 * 41


# The workload


def test_no_model_of_the_size_can_draw_the_eos():
    tokenizer = bench_tokenizer(512)
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == 512  # ids drawn are 0 to 511


def test_prompts_have_the_asked_length_and_differ(model):
    rows = prompt_rows(REGIME, num_steps=3)
    tokenizer = load_tokenizer(str(model))
    assert [len(tokenizer(row["prompt"])["input_ids"]) for row in rows] == [8] * 6
    assert len({row["prompt"] for row in rows}) == 6


def test_one_id_in_thirty_two_ends_completions_of_mean_length_thirty_two():
    assert stopping_ids(512, 32) == list(range(1, 17))


def test_the_reward_differs_between_siblings():
    rewards = varied_reward(["w1 w2", "w1 w3", "w2 w1"])
    assert len(set(rewards)) == 3
    assert all(0 <= reward < 1 for reward in rewards)


def test_the_shape_of_30m_has_30_million_parameters():
    shape = SHAPES["30m"]
    costs = ModelCosts(512, shape.num_layers, 8, 2, 64, 1408, 4096, 4)
    assert costs.num_params == pytest.approx(30e6, rel=0.02)


def test_lists_are_combined_and_single_values_are_kept():
    found = regimes_of(
        (["tiny", "30m"], "fixed", [32, 64], 16, 8, 64), mean_tokens=30, rows_per_forward=None
    )
    assert [(r.shape, r.prompt_tokens) for r in found] == [
        ("tiny", 32),
        ("tiny", 64),
        ("30m", 32),
        ("30m", 64),
    ]
    assert {r.completion_tokens for r in found} == {16}


def test_the_presets_cover_the_published_table():
    sizes = {(r.shape, r.length, r.prompt_tokens, r.group_size) for r in preset_regimes("cpu")}
    assert sizes >= {("tiny", "fixed", p, 8) for p in (32, 128, 256, 1024)}
    assert sizes >= {("tiny", "fixed", 256, 16)}
    assert sizes >= {("tiny", "variable", p, 8) for p in (64, 256)}
    assert sizes >= {("30m", form, p, 8) for form in ("fixed", "variable") for p in (128, 256)}
    assert {(r.shape, r.completion_tokens, r.num_completions) for r in preset_regimes("cuda")} == {
        ("0.5b", 512, 256)
    }
    growth = preset_regimes("growth")
    assert len({(r.prompt_tokens, r.completion_tokens) for r in growth}) >= 9


# The clock


class FakeTime:
    """Advances when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(clock_module, "_times", lambda: (self.now, 10 * self.now))


def reports_of(out: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_clock_divides_a_step_into_phases(monkeypatch):
    time = FakeTime(monkeypatch)
    out = io.StringIO()
    clock = StepClock(io.StringIO("step\nstep\nstop\n"), out, CPU)

    def inner():
        time.now += 2

    def outer():
        time.now += 1
        clock.timed("inner", inner)()
        time.now += 4

    clock.arrive()
    time.now += 8
    clock.timed("outer", outer)()
    clock.lengths = [5, 7]
    clock.arrive()
    time.now += 16
    with pytest.raises(SystemExit):
        clock.arrive()
    ready, first, second = reports_of(out)
    assert ready["memory"]["host"] > 1e6 or not Path("/proc/self/status").exists()
    assert first["cpu_s"] == 15
    assert first["wall_s"] == 150
    assert first["phases"] == {"other": [8, 80], "outer": [5, 50], "inner": [2, 20]}
    assert first["lengths"] == [5, 7]
    assert second["cpu_s"] == 16
    assert second["phases"] == {"other": [16, 160]}
    assert second["lengths"] == []


# Contestants


def steps_of(train, regime, model, tmp_path, **options) -> list[dict]:
    out = io.StringIO()
    clock = StepClock(io.StringIO("step\nstep\n"), out, CPU)
    with pytest.raises(SystemExit):
        train(clock, regime, model, tmp_path, num_steps=3, **options)
    return reports_of(out)[1:]


def test_our_step_forwards_a_prompt_once_for_its_group(model, tmp_path):
    steps = steps_of(train_ours, REGIME, model, tmp_path, **CONTESTANTS["ours"].options)
    assert len(steps) == 2
    for step in steps:
        assert step["lengths"] == [6, 6, 6, 6]
        assert step["tokens"]["forward"] == 2 * (8 + 2 * 6)
        assert step["tokens"]["rollout"] >= 2 * 8 + 4 * 5  # a check at the first adds to it
        assert set(step["phases"]) == {
            *("rollout", "reward", "scoring", "forward", "backward", "optimizer", "other")
        }
        assert sum(cpu for cpu, _ in step["phases"].values()) == pytest.approx(step["cpu_s"])
    assert steps[1]["tokens"]["rollout"] == 2 * 8 + 4 * 5


def test_the_stand_in_forwards_every_row_with_its_prompt(model, tmp_path):
    options = CONTESTANTS["stand_in"].options
    steps = steps_of(train_ours, REGIME, model, tmp_path, **options)
    assert steps[1]["tokens"] == {"rollout": 4 * 8 + 4 * 5, "forward": 4 * (8 + 6)}


def test_completions_of_variable_length_end_before_the_limit(tmp_path):
    regime = Regime("tiny", "variable", 4, 24, 4, 16, mean_tokens=4)
    write_model(tmp_path / "model", regime)
    options = CONTESTANTS["ours"].options
    lengths = steps_of(train_ours, regime, tmp_path / "model", tmp_path / "work", **options)
    drawn = [n for step in lengths for n in step["lengths"]]
    assert len(drawn) == 32
    # The mean of 32 geometric lengths of mean 4 has a standard deviation of 0.6.
    assert 2 < sum(drawn) / len(drawn) < 7


def test_trl_forwards_every_row_with_its_prompt(model, tmp_path):
    pytest.importorskip("trl")
    from lightning_grpo.benchmark.trl_trainer import train_trl

    steps = steps_of(train_trl, REGIME, model, tmp_path, **CONTESTANTS["trl_best"].options)
    for step in steps:
        assert step["lengths"] == [6, 6, 6, 6]
        assert step["tokens"] == {"rollout": 4 * 8 + 4 * 5, "forward": 4 * (8 + 6)}
        assert {"rollout", "reward", "forward", "backward", "optimizer"} <= set(step["phases"])


def test_a_regime_sets_the_size_of_a_forward_for_everyone():
    regime = Regime("tiny", "fixed", 10, 6, 4, 16, rows_per_forward=8)
    ours = CONTESTANTS["ours"].options_for(regime)
    assert ours["module"]["microbatch_tokens"] == 2 * (10 + 4 * 6)
    padded = CONTESTANTS["stand_in"].options_for(regime)
    assert padded["module"] == {"packing": "off", "microbatch_tokens": 8 * 16}
    assert CONTESTANTS["ours"].options == {"module": {}, "rollout": {}}


# The gate


def test_ours_and_trl_compute_the_same(model, tmp_path):
    pytest.importorskip("trl")
    found = compare(model, tmp_path, REGIME, CPU, "float32")
    assert set(found) == {"completion", "token"}
    assert problems_of(found, "float32") == []
    assert max(value for values in found.values() for value in values) < 1e-5


def test_the_gate_sees_another_loss(model, tmp_path):
    pytest.importorskip("trl")
    from lightning_grpo.benchmark.frozen import frozen_batch
    from lightning_grpo.policy import load_policy

    batch = frozen_batch(model, REGIME)
    assert len({len(row) for row in batch.completion_ids}) > 1
    policy = load_policy(str(model), num_tokens=512).train()
    ours = our_step(policy, batch, REGIME, "completion", model, "float32")
    theirs = trl_step(model, tmp_path, batch, REGIME, "token", "float32")
    problems = problems_of({"mixed": difference_of(ours, theirs, 0.2)}, "float32")
    assert [line.split()[0] for line in problems] == ["loss", "grad_norm"]


def test_nothing_passes_the_gate_that_is_no_number():
    assert problems_of({"token": (9e-5, 9e-5, 9e-5)}, "float32") == []
    assert len(problems_of({"token": (math.nan, 2e-4, math.inf)}, "float32")) == 3
    assert problems_of({"token": (1e-2, 1e-2, 1e-2)}, "bfloat16") == []


def test_a_failed_gate_stops_the_benchmark(monkeypatch, tmp_path):
    pytest.importorskip("trl")

    def job(job, folder):
        if job["kind"] == "machine":
            return {"name": "here", "device": "cpu", "bytes_per_s": 1e9, "flops_per_s": 1e9}
        return {"token": (0.0, 0.0, 1e-3)}

    monkeypatch.setattr(tool, "run_job", job)
    monkeypatch.setattr(tool, "run_by_turns", lambda *args, **options: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=r"do not compute the same.*grad_norm"):
        tool.benchmark(output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Sampler against trainer


def test_every_decoder_samples_from_what_the_trainer_scores(model):
    gaps = {(gap.engine, gap.dtype): gap for gap in sampler_gaps(model, REGIME, CPU)}
    assert {engine for engine, _ in gaps} == {"native, fused", "native, cached", "transformers"}
    for (_, dtype), gap in gaps.items():
        limit = 1e-5 if dtype == "float32" else 5e-2
        assert 0 < gap.mean <= gap.max < limit
    assert gaps["transformers", "bfloat16"].mean > 10 * gaps["transformers", "float32"].mean


# Results and tables


def step_report(cpu_s: float, host: int = 300) -> dict:
    phases = {"rollout": [cpu_s / 2, 1.0], "forward": [0.25, 1.0], "backward": [0.25, 1.0]}
    return {
        "cpu_s": cpu_s,
        "wall_s": 2 * cpu_s,
        "phases": phases,
        "tokens": {"rollout": 52, "forward": 56},
        "lengths": [6, 6, 6, 2],
        "memory": {"host": host},
    }


def two_results() -> list[Result]:
    ours = [step_report(s) for s in (1.0, 2.0, 4.0)]
    theirs = [step_report(s, 900) for s in (3.0, 4.0, 40.0)]
    return [
        Result(CONTESTANTS["ours"], REGIME, {"host": 100}, ours, ours),
        Result(CONTESTANTS["trl_best"], REGIME, {"host": 200}, theirs, theirs),
    ]


def test_a_ratio_is_the_median_over_pairs_of_steps():
    ours, theirs = rows_of(two_results(), Machine(1e9, 1e9), is_cuda=False)
    assert theirs.speedup == (3.0, 2.0, 10.0)
    assert ours.speedup == (1.0, 1.0, 1.0)
    assert ours.samples_per_s == 4 / 2.0
    assert theirs.cpu_s == (4.0, 3.0, 40.0)
    assert theirs.wall_s == (8.0, 6.0, 80.0)
    assert ours.completion_tokens == 5.0
    assert ours.completion_tokens_per_s == 20 / 2.0
    assert (theirs.peak_bytes, theirs.start_bytes) == (900, 200)
    assert ours.phases_s["rollout"] == 1.0
    assert ours.phases_s["reward"] == 0.0


def test_useful_operations_are_the_same_for_all_and_hardware_ones_are_not():
    ours, theirs = rows_of(two_results(), Machine(1e9, 1e9), is_cuda=False)
    assert ours.mfu_useful == theirs.mfu_useful
    assert ours.mfu_hardware < ours.mfu_useful  # shared prompts
    assert theirs.mfu_hardware > theirs.mfu_useful  # padding
    # 4 layers of 184,832 weights and the last norm, a head of 65,536; 52 tokens, 20 scored, 688
    # squares: (6 * 739,456 * 52 + 8 * 65,536 * 20 + 6 * 4 * 4 * 32 * 688) / (0.5 s * 1e9).
    assert ours.mfu_useful == pytest.approx(0.486619136, rel=1e-12)
    assert theirs.mfu_hardware == pytest.approx(0.526897152, rel=1e-12)


def test_the_tables_hold_every_row(tmp_path):
    rows = rows_of(two_results(), Machine(1e9, 1e9), is_cuda=False)
    report = Report(
        machine_name="some processor",
        is_cuda=False,
        machine=Machine(1e9, 2e9),
        versions={"torch": "2.13.0"},
        num_threads=1,
        num_warmup=2,
        contestants=[CONTESTANTS["ours"], CONTESTANTS["trl_best"]],
        gate={"token": (1e-6, 2e-8, 3e-8)},
        rows=rows,
        gaps=[{"engine": "native, fused", "dtype": "float32", "mean": 1e-7, "max": math.nan}],
    )
    report.write(tmp_path / "out")
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "some processor" in text and "without vLLM" in text and "1e-06 nats" in text
    assert "| tiny P=8 C=6 G=2 B=4 | ours | 2,000 (1,000 to 4,000) |" in text
    assert "|  | trl_best | 4,000 (3,000 to 40,000) |" in text
    assert "3.00 (2.00 to 10.00)" in text
    with (tmp_path / "out" / "benchmark.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert [row["contestant"] for row in found] == ["ours", "trl_best"]
    assert found[1]["speedup_median"] == "3.0"
    assert found[1]["prompt_tokens"] == "8"
    assert found[0]["cpu_s_median"] == "2.0"


# The command


def test_the_command_measures_ours_alone(monkeypatch, tmp_path, capsys):
    machine = {"name": "here", "device": "cpu", "bytes_per_s": 1e9, "flops_per_s": 1e9}
    monkeypatch.setattr(tool, "run_job", lambda job, _: machine if job["kind"] == "machine" else [])
    sizes = ["--prompt_tokens", "4", "--completion_tokens", "3", "--group_size", "2"]
    rest = ["--num_completions", "4", "--contestants", "[ours]", "--num_steps", "2"]
    rest += ["--num_warmup", "0", "--output", str(tmp_path / "out")]
    main(["benchmark", *sizes, *rest])
    assert "samples/s" in capsys.readouterr().out
    with (tmp_path / "out" / "benchmark.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (row["contestant"], row["num_steps"]) == ("ours", "2")
    assert float(row["update_tokens"]) == 2 * (4 + 2 * 3)
    assert float(row["cpu_s_median"]) > 0


def test_a_contestant_that_ends_says_why(tmp_path):
    with pytest.raises(ValueError, match="benchmark job ours ended with exit code 1"):
        run_by_turns(
            [CONTESTANTS["ours"]],
            REGIME,
            tmp_path / "nowhere",
            tmp_path / "work",
            num_warmup=0,
            num_steps=1,
            num_threads=1,
        )


def test_a_worker_ends_with_its_context(tmp_path):
    job = {"kind": "machine", "num_threads": 1}
    with pytest.raises(KeyboardInterrupt), Worker(job, tmp_path / "machine") as worker:
        raise KeyboardInterrupt
    assert worker.process.returncode != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_warmup": -1}, "num_warmup must be at least 0"),
        ({"num_threads": 100_000}, "this machine has"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"prompt_tokens": []}, "prompt_tokens must have at least one value"),
        ({"prompt_tokens": 40_000}, "make more than 32768"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"num_completions": 12}, "num_completions 12 must be a multiple of group_size 8"),
        ({"rows_per_forward": 12}, "rows_per_forward 12 must be a multiple of group_size 8"),
        ({"mean_tokens": 1}, "mean_tokens must be at least 2"),
        ({"bandwidth_gb_per_s": 0.0}, "bandwidth_gb_per_s must be above 0"),
        ({"preset": "cpu", "prompt_tokens": 64}, "leave out shape"),
        ({"contestants": []}, "one or more different names"),
        ({"contestants": ["ours", "ours"]}, "one or more different names"),
    ],
)
def test_options_that_measure_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tool.benchmark(**options)


def test_without_trl_a_stand_in_takes_its_place_and_says_so(monkeypatch):
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    assert [c.name for c in tool.choose_contestants(None)] == ["ours", "stand_in"]
    assert "not TRL" in CONTESTANTS["stand_in"].meaning
    with pytest.raises(ValueError, match=r"pip install 'lightning-grpo\[bench\]'"):
        tool.choose_contestants(["ours", "trl_best"])
