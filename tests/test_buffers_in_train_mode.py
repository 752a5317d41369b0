"""Layers in train mode that edit their own buffers: plain autograd's gradients, and its buffers afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import backdrift as bd
from backdrift.carried import MOST_BYTES, Carrier
from backdrift.errors import StateChangedError
from backdrift.memory import Ledger
from tiny_pipelines import LATENT, PICTURE, TOKENS, WIDTH, tiny_sd

Layer = Callable[[], nn.Module]


class Average(nn.Module):
    """Divides by an exponential average of the sizes that it has seen; the buffer is replaced, not edited."""

    size: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.size = 0.5 * self.size + 0.5 * x.detach().abs().mean()
        return x / self.size


def spectral() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(8, 8, dtype=torch.float64))


LAYERS: dict[str, Layer] = {
    "batch norm": lambda: nn.BatchNorm1d(8, dtype=torch.float64),
    "spectral norm": spectral,
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8, dtype=torch.float64)),
    "average": Average,
}
METHODS: dict[str, tuple[Any, Any]] = {
    "min": (bd.Exact("min"), bd.Euler()),
    "max": (bd.Exact("max"), bd.AdamsBashforth(2)),
    "symplectic": (bd.SymplecticAdjoint(), bd.Heun()),
    "stored": (bd.SymplecticAdjoint("stored"), bd.RK4()),
    "reversible": (bd.Reversible(), bd.ReversibleHeun()),
}


class Network(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.into, self.out = (nn.Linear(*s, dtype=torch.float64) for s in ((3, 8), (8, 3)))
            self.layer = layer()
        self.train()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(self.into(x)) + t[:, None] + cond.sum()))


def pulled(
    network: Network, gradient: Any, solver: Any, *, times: int = 1
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients by x_T, cond and the weights, and the buffers afterwards."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cond = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    model = bd.Denoiser(network, bd.VP.linear())
    x0 = bd.sample(model, x, cond, solver=solver, grid=bd.TimeGrid("uniform", 4), gradient=gradient).x0
    loss = (x0.square() * torch.arange(12.0, dtype=torch.float64).reshape(4, 3)).sum()
    for i in range(times):
        grads = torch.autograd.grad(loss, [x, cond, *network.parameters()], retain_graph=i < times - 1)
    return list(grads), {name: b.clone() for name, b in network.named_buffers()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_run_has_plain_autograds_gradients_and_buffers(layer: str, method: str) -> None:
    gradient, solver = METHODS[method]
    network = Network(LAYERS[layer])
    expected, buffers = pulled(copy.deepcopy(network), bd.Plain(), solver)
    for times in (1, 2):
        found, after = pulled(copy.deepcopy(network), gradient, solver, times=times)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        for name, value in buffers.items():
            assert torch.equal(after[name], value), name


def test_a_large_buffer_is_not_copied_and_its_edit_is_noticed() -> None:
    class Large(nn.Module):
        table: Tensor

        def __init__(self, moving: bool) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(MOST_BYTES // 8 + 1, dtype=torch.float64))
            self.moving = moving

        def forward(self, x: Tensor) -> Tensor:
            if self.moving:
                self.table += 1
            return x * self.table[0]

    gradient, solver = METHODS["min"]
    still = Network(lambda: Large(False))
    carried = Carrier(list(still.modules())).now()
    assert carried is not None
    assert [copy.content for copy in carried._copies] == [None]
    pulled(still, gradient, solver)
    with pytest.raises(StateChangedError, match="'table' of a Large in train mode"):
        pulled(Network(lambda: Large(True)), gradient, solver)


@pytest.mark.parametrize("layer", ["batch norm", "spectral norm"])
@pytest.mark.parametrize("memory", ["min", 1_600_000])
def test_a_pipeline_has_plain_autograds_bits_and_buffers(layer: str, memory: Any) -> None:
    def pipeline() -> Any:
        pipe = tiny_sd()
        block = pipe.unet.mid_block.resnets[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if layer == "batch norm":
                block.norm1 = nn.BatchNorm2d(block.norm1.num_channels)
            else:
                parametrizations.spectral_norm(block.conv1)
        pipe.unet.train()
        return pipe

    def call(pipe: Any) -> tuple[dict[str, Any], list[Tensor]]:
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 4, LATENT, LATENT, generator=draw).requires_grad_()
        embeds = [torch.randn(2, TOKENS, WIDTH, generator=draw).requires_grad_() for _ in range(2)]
        names = ("prompt_embeds", "negative_prompt_embeds")
        size = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 3}
        return {"latents": noise, **dict(zip(names, embeds, strict=True)), **size}, [noise, *embeds]

    pipe = pipeline()
    arguments, leaves = call(pipe)
    images = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **arguments).images
    expected = torch.autograd.grad(
        images.square().sum(), [*leaves, *pipe.unet.parameters()], allow_unused=True
    )
    buffers = {name: b.clone() for name, b in pipe.unet.named_buffers()}
    pipe = pipeline()
    arguments, leaves = call(pipe)
    with bd.differentiable(pipe, memory=memory, train="unet", clamp=True):
        images = pipe(**arguments).images
    found = torch.autograd.grad(images.square().sum(), [*leaves, *pipe.unet.parameters()], allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    for name, value in pipe.unet.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_a_ledgers_redone_call_leaves_the_buffers_alone() -> None:
    layer = nn.BatchNorm1d(3).train()
    ledger, x = Ledger("min"), torch.randn(8, 3, requires_grad=True)
    first = ledger.call(layer, x, modules=[("layer", layer)])
    second = ledger.call(layer, first, modules=[("layer", layer)])
    before = layer.running_mean.clone(), int(layer.num_batches_tracked)
    (second**3).sum().backward()
    assert torch.equal(layer.running_mean, before[0])
    assert int(layer.num_batches_tracked) == before[1] == 2
