"""FSDP2 whose ranks each write their own shard, into a folder that appears when all are there."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_grpo.checkpoints.folder import remove_checkpoint
from lightning_grpo.checkpoints.io import metric_of
from lightning_grpo.checkpoints.optimizer_names import parameter_names, with_names
from lightning_grpo.checkpoints.ranks import load_sharded, save_sharded


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, with checkpoints that every other strategy reads too.

    `trainer.strategy fsdp2` means this one.

    Args:
        data_parallel_size: ranks that the model is sharded over; auto takes all.
        process_group_backend: of torch.distributed; that of the device when null.
        timeout: of an exchange between ranks.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Find the other ranks."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights, of which this rank holds its shards, where they are."""
        return self.lightning_module.state_dict()  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by the names of parameters, of which this rank holds its shards."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        names = parameter_names(optimizer, self.lightning_module.named_parameters())  # type: ignore[union-attr]
        return with_names(optimizer.state_dict(), names)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. Every rank has to call it.

        Args:
            checkpoint: of Lightning; what is not sharded in it counts as rank 0 has it.
            filepath: folder that is not there yet, the same path or URL for all ranks.
            storage_options: the Metric for which it is kept, if any.
        """
        save_sharded(self.broadcast(str(filepath)), checkpoint, metric_of(storage_options))

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and, for a fit, moments from a checkpoint of any number of ranks.

        Args:
            checkpoint_path: as `resolve_checkpoint` takes it.
            weights_only: has no effect, nothing is ever unpickled.

        Returns:
            All else that was saved.
        """
        module = self.lightning_module
        assert module is not None
        url = self.broadcast(str(checkpoint_path))
        is_fit = module.trainer.state.fn == TrainerFn.FITTING
        return load_sharded(url, module, self.optimizers if is_fit else None)

    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint; nothing to do when it is gone."""
        if self.is_global_zero:
            remove_checkpoint(filepath)


StrategyRegistry.register("fsdp2", ShardedStrategy, override=True)
