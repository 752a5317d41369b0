"""Quantised frozen bases: libraries' own tensors and layers where they are installed, and stand-ins of each kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_precision_and_layout import SIZE, TRAP, assert_bits, inputs, loss_of, plain
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import UnsupportedError
from backdrift.planning.meta import storage_bytes
from small_jobs import call_of, heavy_flux, measured
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3

Quantise = Callable[[nn.Module], None]


class Whole(nn.Parameter):
    """Whole numbers as a weight, and their scale beside them."""

    scale: Tensor


class _Product(torch.autograd.Function):
    """A frozen layer's product with its input, the way libraries write it: the table is kept, nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Whole) -> Tensor:
        ctx.weight = weight
        return x @ (weight.to(x.dtype) * weight.scale).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = ctx.weight
        return grads[0] @ (weight.to(grads[0].dtype) * weight.scale), None


class Tabled(nn.Linear):
    """A linear layer that computes with what lies beside its weight."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None)
        scale = like.weight.detach().abs().max() / 127
        self.weight = Whole((like.weight.detach() / scale).round().to(torch.int8), requires_grad=False)  # type: ignore[assignment]
        self.weight.scale = scale.reshape(1)
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class Settling(Tabled):
    """It settles on the dtype of its first input, and casts its bias to that in place, as bitsandbytes' layers do."""

    settled: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.settled = self.settled or x.dtype
        if self.bias is not None:
            self.bias.data = self.bias.data.to(self.settled)
        return super().forward(x)


class Unpacked(Tabled):
    """It unpacks its weight for PyTorch's own product, which keeps it."""

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight.scale)


class Rounding(Tabled):
    """It rounds its input too, and nobody wrote a backward pass for that."""

    def product(self, x: Tensor) -> Tensor:
        step = x.detach().abs().max() / 127
        return super().product((x / step).round() * step)


class Halved(Tabled):
    """Its backward pass is wrong."""

    def product(self, x: Tensor) -> Tensor:
        return super().product((x + x.detach()) / 2)


def by_class(layer: type[Tabled]) -> Quantise:
    def quantise(network: nn.Module) -> None:
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, layer(child))

    return quantise


def torchao(network: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())


def torchao_float8(network: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(network, quantization.Float8WeightOnlyConfig())


def bitsandbytes(bits: int) -> Quantise:
    def quantise(network: nn.Module) -> None:
        nn_ = pytest.importorskip("bitsandbytes").nn
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not nn.Linear:
                    continue
                size, data = (child.in_features, child.out_features), child.weight.data.clone()
                bias = child.bias is not None
                if bits == 4:
                    made = nn_.Linear4bit(*size, bias, compute_dtype=torch.float32, quant_type="nf4")
                    made.weight = nn_.Params4bit(data, requires_grad=False, quant_type="nf4")
                else:
                    made = nn_.Linear8bitLt(*size, bias, has_fp16_weights=False)
                    made.weight = nn_.Int8Params(data, requires_grad=False, has_fp16_weights=False)
                made.bias = child.bias
                setattr(parent, name, made)
        network.to("cpu")

    return quantise


def gguf(network: nn.Module) -> None:
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q8_0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % 32 == 0:
                size, bias = (child.in_features, child.out_features), child.bias
                made = GGUFLinear(*size, bias is not None, compute_dtype=torch.float32)
                data = library.quants.quantize(child.weight.detach().numpy(), kind)
                made.weight, made.bias = GGUFParameter(torch.from_numpy(data), quant_type=kind), bias
                setattr(parent, name, made)


WAYS = {
    "a layer class": by_class(Tabled),
    "a layer that unpacks": by_class(Unpacked),
    "torchao, int8": torchao,
    "torchao, float8": torchao_float8,
    "bitsandbytes, 8 bit": bitsandbytes(8),
    "bitsandbytes, 4 bit": bitsandbytes(4),
    "gguf": gguf,
}


quiet = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # peft's, about merging


def network_of(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


@TRAP.handled(
    "layer classes that compute with tables beside their weights (bitsandbytes, GGUF), and torchao's own tensors, also "
    "under a budget, which counts what they really take"
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_bits_and_budget(make: Callable[[], Any], way: str) -> None:
    pipe = make()
    WAYS[way](network_of(pipe))
    given = inputs(pipe)
    leaves = list(given.values())
    theirs = torch.autograd.grad(loss_of(plain(pipe, **given)), leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that the call could not be planned
        for memory in ("min", 2_000_000):
            run = bd.differentiable(pipe, memory, clamp=True)
            assert_bits(torch.autograd.grad(loss_of(run(**given, **SIZE).images), leaves), theirs)
    assert run.plan is not None
    components = {part.name: part.weights for part in run.plan.job.components}
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    linear = sum(m.weight.numel() for m in network_of(make()).modules() if type(m) is nn.Linear)
    saved = storage_bytes(network_of(make()).parameters()) - components[name]
    if way == "gguf":  # of rows that 32 divides
        linear = sum(
            m.in_features * m.out_features
            for m in network_of(pipe).modules()
            if type(m).__name__ == "GGUFLinear"
        )
    # Of four bytes a number one is left, or half a one, and the scales; layers this small have large tables, too.
    assert linear < saved < 3.5 * linear
    if way.startswith("a layer"):
        layers = sum(isinstance(m, Tabled) for m in network_of(pipe).modules())
        assert saved == 3 * linear - 4 * layers


@pytest.mark.parametrize("layer", [Tabled, Unpacked])
@pytest.mark.parametrize("keep", [0, 2])
def test_what_layers_unpack_is_counted(layer: type[Tabled], keep: int) -> None:
    pipe = heavy_flux()
    by_class(layer)(pipe.transformer)
    call = call_of(pipe, 3)
    plan = bd.plan(pipe, **call, choices=bd.Choices(keep=keep))
    assert plan.peak - plan.job.weights == pytest.approx(measured(pipe, call, memory=plan), rel=0.1)


@quiet
@TRAP.handled("LoRA on a quantised base (QLoRA)")
@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_a_quantised_base(way: str) -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    WAYS[way](pipe.unet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = ["to_q", "to_v"]
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian"))
        lora = [p for n, p in pipe.unet.named_parameters() if "lora" in n]
        for p in lora:
            p.data += 0.01 * torch.randn_like(p)
    given = {k: v.detach() for k, v in inputs(pipe).items()}
    theirs = torch.autograd.grad(loss_of(plain(pipe, **given)), lora)
    assert all(g.abs().max() > 0 for g in theirs)
    run = bd.differentiable(pipe, "min", train="lora", clamp=True)
    assert_bits(torch.autograd.grad(loss_of(run(**given, **SIZE).images), lora), theirs)


@TRAP.refused(
    "layers that quantise their activations too and give them no gradient, or a wrong one (torchao's dynamic "
    "quantisation): quantise the weights alone"
)
def test_rounded_activations_are_refused() -> None:
    for layer, says in (
        (Rounding, "no gradient reaches its input"),
        (Halved, r"a gradient that is \d+% off"),
    ):
        pipe = tiny_sd3()
        by_class(layer)(pipe.transformer.transformer_blocks)
        with pytest.raises(UnsupportedError, match=rf"transformer\.transformer_blocks.*quantised.*{says}"):
            bd.differentiable(pipe)


def test_torchaos_dynamic_quantisation_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipe = tiny_sd()
    quantization.quantize_(pipe.unet, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(UnsupportedError, match="no gradient reaches its input"):
        bd.differentiable(pipe)


def test_looking_at_layers_draws_no_random_numbers_and_changes_nothing() -> None:
    pipe = tiny_sd()
    by_class(Settling)(pipe.unet)
    for layer in pipe.unet.modules():
        if isinstance(layer, Settling) and layer.bias is not None:
            layer.bias.data = layer.bias.data.double()  # as if a first call were yet to cast it
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    state = torch.get_rng_state()
    with bd.differentiable(pipe):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    after = pipe.unet.state_dict()
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in after.items())
    assert {m.settled for m in pipe.unet.modules() if isinstance(m, Settling)} == {None}
    assert all(p.grad is None for p in pipe.unet.parameters())
