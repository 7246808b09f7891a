"""Trees of plain values and tensors as JSON values and named tensors, and back to the bit.

JSON knows None, bool, int, float, str, list and dicts with string keys. Everything else is a dict
with one key that begins with `$`:

    {"$tensor": "<name>"}            a tensor, kept elsewhere under that name
    {"$float": "nan"}                nan, inf or -inf
    {"$bytes": "<base64>"}
    {"$tuple": [...]}
    {"$dict": [[key, value], ...]}   a dict whose keys are not all plain strings
    {"$ordered": [[key, value], ...]}   an OrderedDict

Nothing that is read back can name a class or a function, so reading runs no code.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_grpo.checkpoints.errors import BrokenCheckpointError

_PLAIN = (type(None), bool, int, str)
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(tree: Any, root: Sequence[str] = ()) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON values and named tensors.

    Args:
        tree: of None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict and tensors;
            no subclasses of them.
        root: where the tree is, which the names of its tensors begin with.

    Returns:
        The tree with names in the place of tensors, and name -> tensor. A name is the path of the
        tensor, joined with `/`.

    Raises:
        TypeError: it holds something else; the message has its path.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, tuple(root), tensors), tensors


def decode(plain: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Put a tree together again.

    Args:
        plain: as `encode` gave it.
        tensor: gives the tensor of a name; a KeyError for one that is not there.

    Returns:
        The tree.

    Raises:
        BrokenCheckpointError: `encode` cannot have written this.
    """
    if isinstance(plain, list):
        return [decode(item, tensor) for item in plain]
    if not isinstance(plain, dict):
        return plain
    tag = next(iter(plain), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensor) for key, value in plain.items()}
    try:
        if len(plain) != 1:
            raise ValueError("other keys beside it")
        return _decode_tagged(tag, plain[tag], tensor)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise BrokenCheckpointError(f"{tag} {str(plain[tag])[:80]!r}: {error!r}") from error


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
    if kind is dict and all(type(key) is str and key[:1] != "$" for key in value):
        return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
    if kind in (dict, OrderedDict):
        pairs = [
            [_encode(key, (*path, "<key>"), tensors), _encode(item, (*path, str(key)), tensors)]
            for key, item in value.items()
        ]
        return {"$dict" if kind is dict else "$ordered": pairs}
    if kind is tuple:
        return {"$tuple": [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if kind in (Tensor, nn.Parameter):
        return {"$tensor": _add(value, path, tensors)}
    raise TypeError(
        f"a checkpoint cannot hold the {kind.__module__}.{kind.__qualname__} at "
        f"{'/'.join(path) or 'its root'}: turn it into plain numbers, strings, lists, dicts or "
        "tensors (in state_dict of the callback or module that it belongs to)"
    )


def _add(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    name = stem = "/".join(path) or "tensor"
    number = 1
    while name in tensors:  # keys may hold a `/`, or be 1 and "1"
        number += 1
        name = f"{stem}#{number}"
    tensors[name] = tensor
    return name


def _decode_tagged(tag: str, content: Any, tensor: Callable[[str], Tensor]) -> Any:
    if tag == "$tensor":
        return tensor(content)
    if tag == "$float":
        return _NONFINITE[content]
    if tag == "$tuple":
        return tuple(decode(item, tensor) for item in content)
    if tag == "$bytes":
        return base64.b64decode(content, validate=True)
    if tag in ("$dict", "$ordered"):
        pairs = [(decode(key, tensor), decode(value, tensor)) for key, value in content]
        return dict(pairs) if tag == "$dict" else OrderedDict(pairs)
    raise ValueError("unknown tag")
