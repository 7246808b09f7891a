"""The Triton kernels give what plain PyTorch gives: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engines import KEY, PROMPTS, TOKENIZER, assert_same, batch_of, tiny_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of Triton 3.6 does not run with NumPy 2.4.
pytest.importorskip("triton", minversion="3.7" if DEVICE == "cpu" else None)

from lightning_grpo import logprobs
from lightning_grpo.generation import NativeEngine, Sampling, TransformersEngine, sampling
from lightning_grpo.generation.pooled_decoder import PooledDecoder
from lightning_grpo.kernels import logit_difference, logit_kernels, triton_logits
from lightning_grpo.kernels.pooled_attention import Places, Widths, pooled_attention
from lightning_grpo.kernels.triton_attention import kernel_attention
from lightning_grpo.logprobs import linear_logprobs


# Heads, heads of keys, size of a head.
@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 4, 8), (6, 2, 80), (4, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_attention_over_a_pool_is_that_of_gathered_keys(
    heads: tuple[int, int, int], dtype: torch.dtype
):
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, 900, num_kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    kv[:, 899] = torch.inf  # never read
    q = torch.randn(9, num_heads, head_dim, generator=generator).to(DEVICE)
    # Prompts of 66, 3 and 1 cells, shared by rows that do not lie together; two places without one.
    columns = [
        [1, 1, 70, 1, 0, 70, 1, 0, 200],
        [66, 66, 3, 66, 0, 3, 66, 0, 1],
        [300, 360, 420, 480, 0, 540, 600, 0, 660],
        [1, 60, 5, 64, 1, 2, 3, 1, 65],
    ]
    places = Places(*torch.tensor(columns, device=DEVICE).unbind())
    arguments = (q, kv, places, Widths(66, 65), head_dim**-0.5)
    expected = pooled_attention(*arguments)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(kernel_attention(*arguments), expected, atol=tolerance, rtol=0)


def test_a_rollout_with_the_kernel_is_that_of_the_transformers_engine():
    policy, batch = tiny_policy("qwen3").to(DEVICE), batch_of(PROMPTS)
    decoder = PooledDecoder(None, kernel_attention)
    engine = NativeEngine(policy, TOKENIZER, [1], decoders={"kernel": decoder.begin}, max_rows=4)
    options = Sampling(max_completion_tokens=4)
    drawn = engine.generate(batch, options, 2, key=KEY)
    assert engine.decoder_name == "kernel"
    plain = TransformersEngine(policy, TOKENIZER, [1])
    assert_same(drawn, plain.generate(batch, options, 2, key=KEY))


def test_the_kernels_for_logits_pass_the_check_that_is_made_before_their_use():
    assert logit_difference(triton_logits, DEVICE) < 2e-5
    assert logit_kernels("cpu") is None
    if DEVICE == "cuda":
        assert logit_kernels("cuda") is triton_logits
    else:
        with pytest.warns(UserWarning, match="log-probs are computed without Triton kernels"):
            assert logit_kernels("cuda") is None
        logit_kernels.cache_clear()

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(triton_logits, name)

        def logit_gradients(self, *args: Any) -> torch.Tensor:
            return triton_logits.logit_gradients(*args) * 1.01

    assert logit_difference(Wrong(), DEVICE) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("entropy", ["none", "detached", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_from_hidden_states_are_the_same_with_kernels(
    entropy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 16), (1200, 16), (1200,))
    leaves = [torch.randn(*size, generator=generator).to(DEVICE, dtype) for size in sizes]
    ids = (torch.arange(7) * 170).to(DEVICE)
    results = []
    for kernels in (None, triton_logits):
        monkeypatch.setattr(logprobs, "logit_kernels", lambda device, k=kernels: k)
        hidden, weight, bias = (x.clone().requires_grad_() for x in leaves)
        found = linear_logprobs(
            hidden, weight, ids, bias=bias, num_tokens=1100, temperature=0.7, entropy=entropy
        )
        loss = (found[0] * torch.linspace(-1, 1, 7, device=DEVICE)).sum()
        if entropy == "gradient":
            loss = loss + found[1].sin().sum()
        loss.backward()
        results.append([*found, hidden.grad, weight.grad, bias.grad])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results):
        assert one.dtype == other.dtype
        difference = (one.double() - other.double()).norm()
        assert float(difference) <= tolerance * float(1 + other.double().norm())


def test_draws_are_the_same_with_kernels(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 3000, generator=generator)
    logits[2, :2500] = -torch.inf
    u = torch.rand(6, dtype=torch.float64, generator=generator)
    logits, u = logits.to(DEVICE), u.to(DEVICE)
    results = []
    for kernels in (None, triton_logits):
        monkeypatch.setattr(sampling, "logit_kernels", lambda device, k=kernels: k)
        results.append(sampling.sample_tokens(logits, Sampling(0.7), u))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_grpo.kernels import triton_attention, triton_logits

def compiled(kernel, types, **constants):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

pool = {name: "*bf16" for name in ("q", "keys", "values", "out")}
pool |= {"starts": "*i64", "lengths": "*i64", "scaling": "fp32", "num_rows": "i32"}
pool |= {name: "*fp32" for name in ("maxima", "totals", "weighted_values")}
sizes = {"NUM_KV": 2, "PER_KV": 7, "HEAD_DIM": 64, "WIDTH": 64, "CELLS": 64}
rows = {name: "*fp32" for name in ("maxima", "sums", "products", "normalizers", "entropies")}
rows |= {"scales": "*fp32", "entropy_scales": "*fp32", "logits": "*bf16", "token_ids": "*i64"}
rows |= {"stride": "i32", "num_tokens": "i32", "temperature": "fp32"}
for kernel in (
    compiled(triton_attention._prompt_kernel, pool, ROWS=4, HEADS=8, **sizes),
    compiled(triton_attention._completion_kernel, pool, HEADS=16, **sizes),
    compiled(triton_logits._blocks_kernel, rows, BLOCK=1024),
    compiled(triton_logits._gradients_kernel, rows, BLOCK=1024, HAS_ENTROPY=True),
):
    assert kernel.asm["cubin"]
    print("mma.sync" in kernel.asm["ptx"], kernel.metadata.shared < 49152)
"""


def test_the_kernels_compile_for_a_gpu_with_its_matrix_units(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"] * 2 + ["False", "True"] * 2
