"""The ways in which a block is run: as it stands, with one line added, and with the lines that need no library.

A block's last statement calls ``pipe(...)`` and keeps what it wants of the output. Its syntax tree is edited: nothing
but that statement changes, and what is put in front of it is what a user would type.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backdrift as bd

from .listed import Block
from .models import built_in

#: The one line. ``noise`` is the tensor whose gradient is asked for.
ONE_LINE = "with bd.differentiable(pipe, noise=noise):"

#: The lines of README's "When not to use it", for any network; the call is made with ``latents=noise``.
FIFTEEN_LINES = """
from torch.utils.checkpoint import checkpoint
network = pipe.{network}.requires_grad_(False)
if hasattr(pipe, "vae"):
    pipe.vae.requires_grad_(False)
forward = network.forward
network.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
call = type(pipe).__call__.__wrapped__
"""


class Edited:
    """A block's code with its last statement at hand.

    Args:
        source: of the block.
        steps: sampling steps in place of its own; None: its own.
        twin: the precision in place of every one it names; None: its own.

    Raises:
        ValueError: its last statement does not assign from one call of ``pipe``.
    """

    def __init__(self, source: str, steps: int | None = None, twin: torch.dtype | None = None) -> None:
        self.tree = ast.parse(source)
        if twin is not None:
            self.tree = _Precisions(str(twin).removeprefix("torch.")).visit(self.tree)
        self.statement = self.tree.body[-1]
        calls = [
            node
            for node in ast.walk(self.statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
        ]
        if not isinstance(self.statement, ast.Assign) or len(calls) != 1:
            raise ValueError("a block ends in one assignment from one call of pipe(...)")
        (self.call,) = calls
        self.target = ast.unparse(self.statement.targets[0])
        if steps is not None:
            self.set("num_inference_steps", str(steps))

    def set(self, keyword: str, value: str) -> None:
        """Give the call a keyword."""
        self.call.keywords = [k for k in self.call.keywords if k.arg != keyword]
        self.call.keywords.append(ast.keyword(keyword, ast.parse(value, mode="eval").body))

    def undecorated(self) -> None:
        """``pipe(...)`` becomes ``call(pipe, ...)``."""
        self.call.func = ast.Name("call", ast.Load())
        self.call.args.insert(0, ast.Name("pipe", ast.Load()))

    def before(self, lines: str) -> None:
        """Put lines in front of the last statement."""
        self.tree.body[-1:-1] = ast.parse(lines).body

    def inside(self, line: str) -> None:
        """Put the last statement under a ``with`` line."""
        (block,) = ast.parse(f"{line}\n    pass").body
        assert isinstance(block, ast.With)
        block.body = [self.statement]
        self.tree.body[-1] = block

    def run(self, **names: Any) -> Any:
        """Execute it in a namespace of its own, and return what the block kept."""
        code = compile(ast.fix_missing_locations(self.tree), "<block>", "exec")
        space: dict[str, Any] = {"__name__": "block", **names}
        exec(code, space)
        return space[self.target]

    def __str__(self) -> str:
        return ast.unparse(self.tree)


class _Precisions(ast.NodeTransformer):
    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        named = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if named and node.attr in ("float16", "bfloat16", "float32"):
            return ast.Attribute(node.value, self.name, ast.Load())
        self.generic_visit(node)
        return node


def sampled(
    block: Block, noise: Tensor, steps: int | None, twin: torch.dtype, handed: bool = False
) -> Tensor:
    """What the block makes of this noise in the twin's precision: the pipeline's own call, no gradients anywhere.

    Args:
        handed: pass the noise as ``latents=``; else it takes the place of the pipeline's first draw.
    """
    edited = Edited(block.source, steps, twin)
    edited.set("output_type", "'pt'")
    _hand_in(edited, handed)
    return _run(edited, twin, noise, block)


def plain(
    block: Block,
    noise: Tensor,
    steps: int | None,
    twin: torch.dtype | None = None,
    handed: bool = False,
    frozen: bool = False,
) -> Tensor:
    """Plain autograd through the undecorated call; with all weights as they come, or frozen."""
    edited = Edited(block.source, steps, twin)
    edited.set("output_type", "'pt'")
    edited.undecorated()
    edited.before("call = type(pipe).__call__.__wrapped__")
    if frozen:
        edited.before(
            "[part.requires_grad_(False) for part in pipe.components.values() if hasattr(part, 'forward')]"
        )
    _hand_in(edited, handed)
    return _run(edited, twin, noise, block)


def _hand_in(edited: Edited, handed: bool) -> None:
    if handed:
        edited.set("latents", "latents")
    else:
        edited.inside("with drawing(pipe, noise):")


def one_line(block: Block, noise: Tensor, steps: int | None, twin: torch.dtype | None = None) -> Tensor:
    """The block with :data:`ONE_LINE`."""
    edited = Edited(block.source, steps, twin)
    edited.inside(ONE_LINE)
    return _run(edited, twin, noise, block)


def fifteen_lines(block: Block, noise: Tensor, steps: int | None, twin: torch.dtype | None = None) -> Tensor:
    """The block with :data:`FIFTEEN_LINES`."""
    edited = Edited(block.source, steps, twin)
    edited.set("output_type", "'pt'")
    edited.set("latents", "latents")
    edited.undecorated()
    edited.before(FIFTEEN_LINES.format(network=block.network))
    return _run(edited, twin, noise, block)


def _run(edited: Edited, twin: torch.dtype | None, noise: Tensor, block: Block) -> Tensor:
    torch.manual_seed(0)
    latents = pack(noise, block.latents or block.noise)
    with built_in(twin), one_stream():
        kept = edited.run(bd=bd, torch=torch, noise=noise, latents=latents, drawing=drawing)
    return tensor_of(kept)


def pack(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise in the shape of ``latents=``: as it is, or as Flux packs it, 2x2 patches as tokens."""
    if tuple(noise.shape) == shape:
        return noise
    n, c, h, w = noise.shape
    return noise.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(shape)


def tensor_of(kept: Any) -> Tensor:
    """Pictures, frames or sound as a tensor, channels before height and width.

    Raises:
        TypeError: it is none (a PIL picture, say).
    """
    if hasattr(kept, "to_tuple"):
        kept = kept.to_tuple()[0]
    if isinstance(kept, list | tuple) and kept and isinstance(kept[0], Tensor | np.ndarray):
        return torch.stack([tensor_of(part) for part in kept])
    if isinstance(kept, np.ndarray):
        array = torch.from_numpy(kept)
        return array.movedim(-1, -3) if array.ndim >= 3 and array.shape[-1] == 3 else array
    if not isinstance(kept, Tensor):
        raise TypeError(f"the block keeps a {type(kept).__name__}, not a tensor")
    return kept


@contextmanager
def drawing(pipe: Any, noise: Tensor) -> Iterator[None]:
    """Inside the block the pipeline's own code finds ``noise`` in place of its first draw of that shape."""
    modules = {sys.modules[cls.__module__] for cls in type(pipe).__mro__}
    drawers = {m: m.randn_tensor for m in modules if hasattr(m, "randn_tensor")}
    found: list[bool] = []

    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        draw = own(*args, **kwargs)
        if found or draw.shape != noise.shape:
            return draw
        found.append(True)
        return noise.to(draw)

    own = next(iter(drawers.values()))
    for module in drawers:
        module.randn_tensor = replaced  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, drawer in drawers.items():
            module.randn_tensor = drawer  # type: ignore[attr-defined]
    if not found:
        raise ValueError(f"{type(pipe).__name__} drew nothing of the shape {tuple(noise.shape)}")


@contextmanager
def one_stream() -> Iterator[None]:
    """Inside the block diffusers draws the same numbers in every precision: in float32, rounded to bfloat16."""
    from diffusers.utils import torch_utils

    class Drawing:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def randn(*shape: Any, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
            return torch.randn(*shape, dtype=torch.float32, **how).bfloat16().to(dtype or torch.float32)

    torch_utils.torch = Drawing()
    try:
        yield
    finally:
        torch_utils.torch = torch
