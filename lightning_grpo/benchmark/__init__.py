"""The benchmark: contestants make the same training step by turns, each in its own process."""
