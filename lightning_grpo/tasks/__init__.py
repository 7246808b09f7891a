"""Built-in tasks: each file owns the form of its prompts and the reward for answering them."""

from __future__ import annotations

from lightning_grpo.tasks.sort_digits import SortDigits, sorted_exactly

__all__ = ["SortDigits", "sorted_exactly"]
