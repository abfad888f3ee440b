"""Attention calls of a PyTorch model, seen by a torch function mode, and the module that makes each, by hooks."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from .errors import UsageError

if TYPE_CHECKING:
    from .analysis import Captures

_SOFTMAXES = (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)


class _Watch(TorchFunctionMode):  # sees calls by any name they were imported under, where a patched name would not
    def __init__(self, patterns: list[str], captures: Captures) -> None:
        super().__init__()
        self.patterns, self.captures = patterns, captures
        self.running: list[list[Any]] = []  # [name, calls so far] of the modules that run, innermost last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.running:
            if func is torch.nn.functional.scaled_dot_product_attention:
                self.attention(*args, **kwargs)
            elif func in _SOFTMAXES and out.ndim == 4 and _dim(*args, **kwargs) in (-1, 3) and (name := self.name()):
                self.captures.add_probabilities(name, out)
        return out

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.ndim == 4 and (name := self.name()):
            if is_causal:
                attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            self.captures.add(name, query, key, scale=scale, mask=attn_mask)

    def name(self) -> str:
        """Of the call that is being made; nothing where it is not asked for."""
        module = self.running[-1]
        if not any(fnmatch.fnmatchcase(module[0], pattern) for pattern in self.patterns):
            return ""
        module[1] += 1
        return str(module[0]) if module[1] == 1 else f"{module[0]}#{module[1]}"


def _dim(input: Any, dim: Any = None, *_: Any, **__: Any) -> Any:
    return dim


@contextlib.contextmanager
def watching(model: Any, patterns: list[str], captures: Captures) -> Iterator[None]:
    """Fills `captures` while it lives."""
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"capture: expected a torch.nn.Module, found {type(model).__name__}")
    watch = _Watch(patterns, captures)
    names = {module: name or "model" for name, module in model.named_modules()}
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names.values() for pattern in patterns):
        raise UsageError(f"capture: no module's name fits {', '.join(patterns)}; names are as in named_modules()")
    with contextlib.ExitStack() as stack:
        for module, name in names.items():

            def enter(_: Any, __: Any, name: str = name) -> None:
                watch.running.append([name, 0])

            def leave(*_: Any) -> None:
                watch.running.pop()

            for handle in (
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
        stack.enter_context(watch)
        yield
