"""The processes of a run, one for each GPU: each takes a step on pictures of its own, gradients are averaged."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from .errors import TrainingError


class Team:
    """One process' view of all of them; alone unless `start` made it. Every method has to be called by all processes in
    the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def lead(self) -> bool:
        """Whether this is the process that decides, logs and saves."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def agreed(self, *values: float) -> list[float]:
        """The lead's values: clocks differ, and a loop that one process leaves alone would hang the others."""
        if self.size == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(row, 0)
        return row.tolist()

    def same(self, value: Any) -> Any:
        """The lead's object."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """Gives all the lead's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Mean of the gradients over the processes, in one message; a gradient that is missing counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def size_for(device: str, wanted: int | None) -> int:
    """Processes for a device name: `wanted`, else one for each GPU, one on a CPU."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    there = torch.cuda.device_count() if on_gpu else (os.cpu_count() or 1)
    if wanted is not None and not 1 <= wanted <= there:
        raise TrainingError(f"--processes {wanted}: this machine has {there} {'GPUs' if on_gpu else 'cores'}", 2)
    if device.startswith("cuda:"):
        return 1
    return wanted or (there if on_gpu else 1)


def _member(rank: int, size: int, meeting: str, work: Callable[..., None], arguments: tuple) -> None:
    """One process of the team."""
    code = 1
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size)
        work(Team(rank, size), *arguments)
        dist.destroy_process_group()
        return
    except TrainingError as error:
        print(f"training: process {rank}: {error}", file=sys.stderr, flush=True)
        code = error.code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def start(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(team, *arguments)` in `size` processes and waits for all of them; here, if it is one."""
    if size == 1:
        work(Team(), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            processes.spawn(_member, (size, str(Path(folder) / "meeting"), work, arguments), nprocs=size, daemon=False)
        except processes.ProcessExitedException as error:
            if error.exit_code == 130:
                raise KeyboardInterrupt from None
            raise TrainingError(
                f"process {error.error_index} of {size} ended with code {error.exit_code}; its lines are above",
                2 if error.exit_code == 2 else 1,
            ) from None
        except processes.ProcessRaisedException as error:
            raise TrainingError(f"process {error.error_index} of {size} failed:\n{error}") from None
