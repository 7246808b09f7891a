"""Rewards: the protocol of reward functions, the scorer that calls them, and the built-in ones."""

from lightning_grpo.rewards.answers import (
    completion_text,
    extract_gsm8k_strict,
    extract_last_number,
)
from lightning_grpo.rewards.binding import per_row
from lightning_grpo.rewards.early import EarlyScores
from lightning_grpo.rewards.model import RewardModel
from lightning_grpo.rewards.scorer import RewardError, RewardFunction, Scorer, Scores
from lightning_grpo.rewards.shaping import SoftOverlong
from lightning_grpo.rewards.verifiable import (
    exact_match,
    format_reward,
    gsm8k_flexible,
    gsm8k_strict,
    numeric_match,
)

__all__ = [
    "EarlyScores",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "Scorer",
    "Scores",
    "SoftOverlong",
    "completion_text",
    "exact_match",
    "extract_gsm8k_strict",
    "extract_last_number",
    "format_reward",
    "gsm8k_flexible",
    "gsm8k_strict",
    "numeric_match",
    "per_row",
]
