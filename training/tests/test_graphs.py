"""Recorded steps against plain ones, on a GPU."""

import pytest
import torch

from training.graphs import Recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_a_recorded_step_leaves_the_gradients_of_a_plain_one() -> None:
    """Two kinds of step share memory and parameters; their replays are interleaved with an optimizer's steps."""
    device = torch.device("cuda")
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def compute(x: torch.Tensor) -> tuple[torch.Tensor]:
        loss = model(x).square().mean()
        loss.backward()
        return (loss.detach(),)

    recorder = Recorder(parameters, device)
    for step in range(8):
        x = torch.randn(16 if step % 2 else 48, 40, device=device)
        (loss,) = recorder.run(len(x), compute, x)
        recorded = [p.grad.clone() for p in parameters if p.grad is not None]
        expected = torch.autograd.grad(model(x).square().mean(), parameters)
        assert loss.item() == pytest.approx(model(x).square().mean().item(), rel=1e-4)
        for found, wanted in zip(recorded, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6)
        optimizer.step()


def test_random_numbers_are_new_in_every_replay() -> None:
    """What is drawn inside a recording differs from replay to replay."""
    weight = torch.nn.Parameter(torch.ones(1, device="cuda"))

    def compute(x: torch.Tensor) -> tuple[torch.Tensor]:
        drawn = torch.rand(100, device="cuda")
        (weight * drawn.sum()).sum().backward()
        return (drawn,)

    recorder = Recorder([weight], torch.device("cuda"))
    x = torch.zeros(1, device="cuda")
    drawn = [recorder.run("draw", compute, x)[0] for _ in range(4)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j])
