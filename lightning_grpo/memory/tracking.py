"""Following memory: which storages are alive, and which of them autograd keeps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Follows the storages that the operations inside it make, until they are freed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weights = weight_keys(module)
        self.live: dict[int, int] = {}
        self.copies: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self.weights:
            self.copies.add(storage_key(out))
        return out

    def _note(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key in self.live or key in self.weights:
            return
        storage = tensor.untyped_storage()
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)
        self.copies.discard(key)

    @property
    def copies_now(self) -> int:
        """Bytes of the copies of weights that are alive."""
        return sum(self.live[key] for key in self.copies)


def weight_keys(module: nn.Module) -> set[int]:
    """Storages of parameters and buffers."""
    return {storage_key(t) for t in (*module.parameters(), *module.buffers())}


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata)


class SavedBytes:
    """Collects what autograd keeps: use `pack` as a hook of saved tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = weight_keys(module)
        self.kept: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is not a parameter; memory that several share counts once."""
        key = storage_key(tensor)
        if key not in self.weights:
            self.kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from the forwards inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            yield
