"""`python -m lightning_grpo`."""

from lightning_grpo.cli import main

if __name__ == "__main__":
    main()
