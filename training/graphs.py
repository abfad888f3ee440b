"""Steps recorded as CUDA graphs: a small model's step takes longer to launch than to compute."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Forward and backward of one step: leaves gradients in the parameters, returns figures.
Compute = Callable[..., tuple[Tensor, ...]]


class RecordedStep:
    """Forward and backward for inputs of one shape. Random numbers are new in every replay."""

    def __init__(self, compute: Compute, inputs: tuple[Tensor, ...], parameters: list[torch.nn.Parameter], pool: Any):
        self._inputs = [tensor.clone() for tensor in inputs]
        self._parameters = parameters
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and lets libraries choose their algorithms
            for _ in range(3):
                self._forget()
                compute(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._forget()  # so that the recorded backward writes gradients instead of adding to them
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may ask the driver things that a global recording forbids.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._figures = compute(*self._inputs)
        self._gradients = [parameter.grad for parameter in parameters]

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients into the parameters; figures as copies, for the next replay writes over them."""
        for kept, tensor in zip(self._inputs, inputs, strict=True):
            kept.copy_(tensor)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return tuple(figure.clone() for figure in self._figures)


class Recorder:
    """Records each kind of step when it is first made; on a CPU, or with SPARVAR_GRAPHS=0, steps run as they are."""

    def __init__(self, parameters: list[torch.nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        self._records = device.type == "cuda" and os.environ.get("SPARVAR_GRAPHS", "1") != "0"
        self._steps: dict[Any, RecordedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    def run(self, kind: Any, compute: Compute, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`compute(*inputs)`, recorded under `kind`, which stands for everything but the values of the inputs."""
        if not self._records:
            for parameter in self._parameters:
                parameter.grad = None
            return compute(*inputs)
        if kind not in self._steps:
            self._steps[kind] = RecordedStep(compute, inputs, self._parameters, self._pool)
        return self._steps[kind](*inputs)
