"""Our attention inside upstream's PyTorch models: Infinity and VAR, their own classes and checkpoints.

sparvar.patch(model, attention="sparvar")    # the model draws with sparse attention
sparvar.unpatch(model)                       # and is what it was
"""

from __future__ import annotations

import os
import sys
from typing import Any, TypeVar

from .errors import UsageError
from .plans import Plan

Model = TypeVar("Model")


def patch(model: Model, attention: str | os.PathLike[str] | Plan = "sparvar") -> Model:
    """Makes every self-attention layer of a model run an attention plan, and returns the model.

    model: a `torch.nn.Module` that holds self-attention layers of upstream's Infinity or VAR (FoundationVision). They
    are known by their attributes (`mat_qkv`, `kv_caching`, `cached_k`, ...), not by their class, and only their
    `forward` is replaced, on the instances: cross-attention, the walk over the scales and sampling stay the model's.
    attention: a preset's name (`sparvar.plans.preset_names()`), the path of a JSON file (*.json), or a `sparvar.Plan`,
    with or without a schedule; layers are counted in the order of the model's modules.

    A picture begins where a layer's KV cache is empty. Its schedule is the call's `scale_schedule` (Infinity), the
    model's `patch_nums` (VAR), or the plan's. `cached_k` and `cached_v` stay tensors of upstream's layout, views of
    buffers with room for all scales but the last. At that one a layer gets room for all, until the next layer runs;
    then nothing reads its cache any more, and it is None. The layers must run in float32 or bfloat16 (autocast counts),
    without gradients, in eval mode, with the KV cache on and without a mask: all else is refused when it comes, with
    one line.

    Raises `UsageError` where the model has no such layers or is patched already, and for unknown or pruning plans.
    The method: SparVAR (arXiv:2602.04361), sections 3.2 to 3.4; docs/python.md.
    """
    _engine_side(model, "patch").patch(model, attention)
    return model


def unpatch(model: Model) -> Model:
    """Takes back `patch`: the layers get their own `forward` and nothing of ours stays in them. Returns the model.

    Raises `UsageError` where the model is not patched.
    """
    _engine_side(model, "unpatch").unpatch(model)
    return model


def _engine_side(model: Any, what: str) -> Any:
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise UsageError(f"{what}: expected a torch.nn.Module, found {type(model).__name__}")
    from . import _patched

    return _patched
