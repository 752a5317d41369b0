"""A whole job on a real architecture: a pipeline with random weights, a CLIP-sized loss, and the ways to run it.

The architectures are those whose configurations ship with the package, built on the device itself. Text encoders of
SD1.5 and SDXL are part of the job (they are small, and the prompt is a string); SD3's and Flux's, which hold a T5 of
4.7 billion parameters, are left out and embeddings are given, as whoever trains or optimises with them does.
"""

from __future__ import annotations

import copy
import gc
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backdrift as bd
from backdrift.budget import parse_size
from backdrift.errors import BudgetError
from backdrift.losses import prepare
from backdrift.pipelines.configured import configured, loss_networks
from backdrift.pipelines.refusals import undecorated_call
from backdrift.pipelines.shadow import copied_scheduler

from .measure import peak_bytes

LOSS = "clip-vit-large-patch14"
RANK = 16
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
OURS = ("max", "auto", "min")
PEERS = ("forward", "plain", "fifteen", "blocks")
# Runs that take fewer seconds are made twice, and the second one finds the allocator warm: the quicker one counts.
REPEATED = 8.0
_WITHOUT_TEXTS = ("sd3-medium", "flux-dev")

# What makes an architecture small, by component; the rest of its configuration stays.
_NARROW_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
_NARROW_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_NARROW_TEXT |= {"projection_dim": 32, "vocab_size": 64}
_NARROW: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "vae": _NARROW_VAE,
        "text_encoder": _NARROW_TEXT,
        "unet": {
            "block_out_channels": [8, 8, 16, 16],
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
        },
    },
    "sdxl": {
        "vae": _NARROW_VAE,
        "text_encoder": _NARROW_TEXT,
        "text_encoder_2": _NARROW_TEXT,
        "unet": {
            "block_out_channels": [8, 8, 16],
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": [2, 2, 4],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
    },
    "sd3-medium": {
        "vae": _NARROW_VAE,
        "transformer": {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
        },
    },
    "flux-dev": {
        "vae": _NARROW_VAE,
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [2, 2, 4],
        },
    },
}
_NARROW_LOSS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Setting:
    """What a job is about; a pipeline is built for each.

    Attributes:
        model: a name that :func:`backdrift.plan` knows.
        dtype: ``"bfloat16"`` or ``"float32"``.
        wants: ``"noise"`` or ``"lora"`` (rank 16 on the attentions' projections).
    """

    model: str
    dtype: str
    wants: str


class NotOffered(Exception):
    """A method does not do what a cell asks for."""


def through_of(name: str) -> Any:
    """``bd.Last(K)`` for ``"last K"``; None for ``"all"``.

    Raises:
        NotOffered: this version of the package differentiates through all steps only.
    """
    if name == "all":
        return None
    if not hasattr(bd, "Last") or "through" not in inspect.signature(bd.differentiable).parameters:
        raise NotOffered("this version has no through=bd.Last(K)")
    return bd.Last(int(name.removeprefix("last ")))


class Job:
    """One pipeline with its loss.

    Args:
        setting: what it is about.
        device: where everything lives.
        small: a narrow architecture, 64 pixels wide.
    """

    def __init__(self, setting: Setting, device: torch.device, small: bool) -> None:
        self.setting, self.device, self.small = setting, device, small
        self.dtype = getattr(torch, setting.dtype)
        torch.manual_seed(0)
        self.pipe, size = self._pipeline()
        self.side = 64 if small else size
        self.network_name = "unet" if getattr(self.pipe, "unet", None) is not None else "transformer"
        self.score = _Score(device, small)
        lora = setting.wants == "lora"
        if lora:
            self._add_lora()
        network = getattr(self.pipe, self.network_name)
        self.weights = [p for n, p in network.named_parameters() if "lora_" in n]
        self.arguments = self._arguments()
        self.noise = bd.noise(
            self.pipe, height=self.side, width=self.side, seed=0, dtype=self.dtype, device=device
        )
        self.noise.requires_grad_(not lora)
        self.leaves = self.weights if lora else [self.noise]
        self.train = "lora" if lora else None
        self._plans: dict[tuple[str, int], Any] = {}

    @property
    def weight_bytes(self) -> int:
        """Of everything that stays on the device."""
        modules = [m for m in self.pipe.components.values() if isinstance(m, nn.Module)]
        tensors = [t for m in [*modules, self.score] for t in [*m.parameters(), *m.buffers()]]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _pipeline(self) -> tuple[Any, int]:
        """From the configuration that ships with the package: each network is built on the device itself."""
        pipe, size = configured(self.setting.model, self.dtype)
        narrow = _NARROW[self.setting.model] if self.small else {}
        left_out = ["safety_checker"]
        if self.setting.model in _WITHOUT_TEXTS:
            left_out += [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]
        for name, part in pipe.components.items():
            if name in left_out:
                pipe.register_modules(**{name: None})
            elif isinstance(part, nn.Module):
                pipe.register_modules(**{name: self._built(part, narrow.get(name, {}))})
        if size is None:
            raise ValueError(f"the configuration of {self.setting.model} names no size")
        return pipe, size

    def _built(self, part: Any, changes: dict[str, Any]) -> nn.Module:
        with torch.device(self.device):
            if hasattr(type(part), "from_config") and hasattr(type(part), "load_config"):  # of diffusers
                made = type(part).from_config({**part.config, **changes})
            else:
                made = type(part)(type(part.config)(**{**part.config.to_dict(), **changes}))
        return made.to(self.device, self.dtype).requires_grad_(False).eval()

    def _add_lora(self) -> None:
        from peft import LoraConfig

        network = getattr(self.pipe, self.network_name)
        network.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_LAYERS, init_lora_weights=False)
        )
        network.to(self.device)

    def _arguments(self) -> dict[str, Any]:
        """Keywords of the call, but for noise and steps."""
        given: dict[str, Any] = {"height": self.side, "width": self.side}
        if self.setting.model not in _WITHOUT_TEXTS:
            return given | {"prompt": "a lighthouse on a cliff at dusk"}
        config, generator = self.pipe.transformer.config, torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        wide, pooled = config.joint_attention_dim, config.pooled_projection_dim
        if self.setting.model == "flux-dev":
            return given | {"prompt_embeds": draw(1, 512, wide), "pooled_prompt_embeds": draw(1, pooled)}
        texts = {"prompt_embeds": draw(1, 333, wide), "negative_prompt_embeds": draw(1, 333, wide)}
        pools = {"pooled_prompt_embeds": draw(1, pooled), "negative_pooled_prompt_embeds": draw(1, pooled)}
        return given | texts | pools

    # ------------------------------------------------------------------ ways to run it

    def run(self, method: str, steps: int, through: str = "all") -> dict[str, Any]:
        """Pictures, loss and backward pass one way; what it says about itself.

        Args:
            method: ``"forward"`` (sampling and loss, no gradient), ``"plain"`` (autograd through the undecorated call),
                ``"fifteen"`` (with each network call under ``torch.utils.checkpoint``), ``"blocks"`` (with diffusers'
                own checkpointing of blocks), ``"max"``, ``"auto"``, ``"min"``, a budget such as ``"12GiB"``, or
                ``"8GiB offload"`` (after ``enable_model_cpu_offload``).
        """
        self.clear()
        call = {**self.arguments, "latents": self.noise, "num_inference_steps": steps}
        if method == "forward":
            with torch.no_grad():
                images = self.pipe(**call, output_type="pt").images
                return {"loss": self.score(images).item()}
        if method in PEERS:
            if through != "all":
                raise NotOffered("the lines without a library differentiate through all steps")
            images, run = self._by_hand(method, call), None
        else:
            images, run = self._ours(method, call, through_of(through))
        loss = self.score(images)
        loss.backward()
        return {"loss": loss.item(), **_said(run)}

    def _by_hand(self, method: str, call: dict[str, Any]) -> Tensor:
        own = copy.copy(self.pipe)
        own.__dict__["scheduler"] = copied_scheduler(self.pipe.scheduler)
        network: Any = getattr(self.pipe, self.network_name)
        run = undecorated_call(type(self.pipe))
        with _checkpointed(network, method):
            return run(own, **call, output_type="pt").images

    def _ours(self, method: str, call: dict[str, Any], through: Any) -> tuple[Tensor, Any]:
        memory, _, offload = method.partition(" ")
        how: dict[str, Any] = {"memory": memory, "train": self.train, "clamp": True}
        if through is not None:  # a run plans for its steps itself, within its time
            how |= {"through": through, "loss": None if self.small else LOSS}
        elif _budget(memory) is not None:
            how["memory"] = self._plan(method, call["num_inference_steps"])
        if offload:
            self.pipe.enable_model_cpu_offload(device=self.device)
        try:
            with bd.differentiable(self.pipe, **how) as run:
                images = self.pipe(**call).images
        except BaseException:
            self._back(offload)
            raise
        return images, run

    def _back(self, offload: str) -> None:
        if offload:
            self.pipe.remove_all_hooks()
            self.pipe.to(self.device)

    def finish(self, method: str) -> None:
        """After the backward pass of a run: everything back on the device."""
        self._back(method.partition(" ")[2])

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def gradient(self) -> Tensor:
        """All gradients in one row, on the CPU, in float32."""
        grads = [
            torch.zeros(1) if leaf.grad is None else leaf.grad.flatten().float().cpu() for leaf in self.leaves
        ]
        return torch.cat(grads)

    def prepare(self, method: str, steps: int) -> dict[str, Any]:
        """Plan what a budget is to be used for, before the clock is started; seconds that took."""
        start = time.perf_counter()
        if _budget(method) is None:
            return {}
        self._plan(method, steps)
        return {"planning_seconds": round(time.perf_counter() - start, 2)}

    def _plan(self, method: str, steps: int) -> Any:
        """The plan for a budget, of the pipeline as it is set up for the method; made once for each number of steps."""
        if (method, steps) not in self._plans:
            memory, _, offload = method.partition(" ")
            if offload:
                self.pipe.enable_model_cpu_offload(device=self.device)
            try:
                self._plans[method, steps] = self.plan(steps, memory=memory, offload=bool(offload))
            finally:
                self._back(offload)
        return self._plans[method, steps]

    def plan(self, steps: int, **how: Any) -> Any:
        """What the planner says of this pipeline as it stands, with its loss."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        loss = None if self.small else LOSS
        more = {"loss": loss, "train": self.train, "optimizer": "sgd"}
        return bd.plan(self.pipe, self.side, self.side, steps, **more, **tensors, **how)

    def planned(self, steps: int) -> dict[str, int]:
        """Bytes that plain autograd and the smallest way are expected to need."""
        plan = self.plan(steps)
        return {"plain": plan.plain.needs.peak, "least": plan.least.needs.peak}


def _said(run: Any) -> dict[str, Any]:
    """What a run of ``differentiable`` says about itself, after its backward pass."""
    if run is None:
        return {}
    said = {"calls": run.stats.network_calls, "redone": run.stats.calls_redone}
    plan = run.plan
    return said | ({} if plan is None else {"planned_bytes": plan.peak, "choices": plan.choices.changes})


class _Score(nn.Module):
    """A CLIP vision network with random weights in float32; the cosine of a picture's embedding to a fixed one."""

    def __init__(self, device: torch.device, small: bool) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        settings = {**loss_networks()[LOSS], **(_NARROW_LOSS if small else {})}
        with torch.device(device):
            self.model = (
                CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)).requires_grad_(False).eval()
            )
        self.size = settings["image_size"]
        generator = torch.Generator().manual_seed(2)
        self.register_buffer(
            "goal", torch.randn(1, settings["projection_dim"], generator=generator).to(device)
        )

    def forward(self, images: Tensor) -> Tensor:
        one = torch.full((3,), 0.5, device=images.device)
        found = self.model(pixel_values=prepare(images.float(), self.size, one, one)).image_embeds
        return 1 - nn.functional.cosine_similarity(found, self.goal).mean()


@contextmanager
def _checkpointed(network: Any, method: str) -> Iterator[None]:
    """Each call under ``torch.utils.checkpoint`` ("fifteen"), or each block inside it ("blocks"), or neither."""
    if method == "blocks":
        network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            network.disable_gradient_checkpointing()
        return
    if method == "plain":
        yield
        return
    forward = network.forward
    network.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    try:
        yield
    finally:
        del network.forward


# ---------------------------------------------------------------------------- measuring


def measured(job: Job, method: str, steps: int, through: str) -> dict[str, Any]:
    """One run: seconds, and the most bytes of everything that were on the device at once.

    Under a budget on CUDA the process is first held to it (and 3 % for what the allocator cannot use); if that fails,
    the run is made again without the limit, to see what it would have taken.
    """
    budget = _budget(method)
    said = job.prepare(method, steps) if through == "all" else {}
    if job.device.type != "cuda":
        return _on_cpu(job, method, steps, through) | said
    if budget is None:
        return _on_cuda(job, method, steps, through)
    card = torch.cuda.get_device_properties(job.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.03 * budget / card), job.device)
    try:
        return _on_cuda(job, method, steps, through) | said | {"held_to_bytes": int(1.03 * budget)}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        refused = str(error).splitlines()[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, job.device)
    release()
    return _on_cuda(job, method, steps, through) | said | {"under_the_limit": refused}


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch's allocator has said so, or a library that found no room for its workspace."""
    words = ("out of memory", "ALLOC_FAILED", "unable to find an engine", "CUDNN_STATUS_INTERNAL_ERROR")
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _budget(method: str) -> int | None:
    memory = method.split()[0]
    return None if memory in (*OURS, *PEERS) else parse_size(memory)


def _on_cuda(job: Job, method: str, steps: int, through: str) -> dict[str, Any]:
    release()
    torch.cuda.synchronize(job.device)
    torch.cuda.reset_peak_memory_stats(job.device)
    seconds: list[float] = []
    while not seconds or (len(seconds) == 1 and seconds[0] < REPEATED):
        start = time.perf_counter()
        try:
            found = job.run(method, steps, through)
            torch.cuda.synchronize(job.device)
            seconds.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated(job.device)
            reserved = torch.cuda.max_memory_reserved(job.device)
        finally:
            job.finish(method)
    said = {"peak_bytes": peak, "reserved_bytes": reserved, "seconds_of_runs": seconds}
    return {"seconds": min(seconds), **said, **found}


def _on_cpu(job: Job, method: str, steps: int, through: str) -> dict[str, Any]:
    start, found = time.perf_counter(), {}
    peak = peak_bytes(lambda: found.update(job.run(method, steps, through)), job.device)
    job.finish(method)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak + job.weight_bytes, **found}


def release() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns with ``status="done"``; or why there is nothing."""
    try:
        return {"status": "done", **work()}
    except NotOffered as error:
        return {"status": "not available", "says": str(error)[:300]}
    except BudgetError as error:
        return {"status": "refused", "says": str(error)[:500]}
    except Exception as error:  # whatever it is, the other cells are worth having
        first = (str(error).strip().splitlines() or [""])[0]
        if out_of_memory(error):
            return {"status": "out of memory", "says": first[:300]}
        return {"status": "failed", "says": f"{type(error).__name__}: {first}"[:500]}
