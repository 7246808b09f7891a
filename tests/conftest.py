"""Small models and data that the tests share; nothing here reaches the network."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whomever


@pytest.fixture(autouse=True)
def run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, and leaves no run folder to the next."""
    monkeypatch.chdir(tmp_path)
    left_by_lightning = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in (*left_by_lightning, "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    if "lightning" in sys.modules:  # a test of two ranks may have left this process as the second
        from lightning.pytorch.utilities.rank_zero import rank_zero_only

        monkeypatch.setattr(rank_zero_only, "rank", 0)


@pytest.fixture(scope="session")
def char_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Qwen2 of 20,000 parameters with a character tokenizer."""
    from lightning_grpo.tools.tiny_model import write_tiny_model

    folder = str(tmp_path_factory.mktemp("char_model"))
    write_tiny_model(
        folder,
        characters="0123456789= abcdefghijklmnopqrstuvwxyz",
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        max_positions=64,
    )
    return folder
