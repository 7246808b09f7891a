"""Whether transformers itself can make a model of a folder whose names are not the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loads_as_it_is(folder: Path) -> bool:
    """Let transformers match names and shapes, with tensors that take no memory.

    Some models have other names on the disk than in the module, such as one tensor for each expert.

    Args:
        folder: of transformers.

    Returns:
        Whether nothing is missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True}
    found: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True, **options
    )
    info = found[1]
    return not any(info.get(name) for name in ("missing_keys", "unexpected_keys", "error_msgs"))
