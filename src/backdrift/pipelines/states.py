"""Caches over the steps (first-block cache, Taylor, …): state of a network that one call leaves for the next.

diffusers keeps it in hooks on a network's layers. A run's shadow network gets hooks of its own, with empty state. What
they hold before a call is handed to the call like an argument, gradients and all, so a redone call finds what the
first one found, outside the cache's context too; afterwards they hold again what they held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .casting import HOOK as CASTING
from .casting import upcasting
from .homes import MOVING
from .refusals import reached
from .shadow import networks
from .twins import names

_CUTS = {"detach", "no_grad", "inference_mode"}


def check_states(pipe: Any) -> None:
    """Refuse a pipeline whose networks have hooks of diffusers' that a run cannot take over.

    Raises:
        UnsupportedError: naming the hook and what to do.
    """
    for key, module in networks(pipe).items():
        check_hooks(key, module)


def hooks_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Layer's name, layer, hook's name and hook, of all of diffusers' hooks inside a network."""
    for name, child in module.named_modules():
        registry = child.__dict__.get("_diffusers_hook")
        for hook_name in getattr(registry, "_hook_order", ()):
            yield name, child, hook_name, registry.hooks[hook_name]


def caches_of(module: nn.Module) -> Iterator[str]:
    """Names of the hooks that leave something for later calls, or change what calls compute."""
    return (name for _, _, name, _ in hooks_of(module) if name not in MOVING and name != CASTING)


def check_hooks(key: str, module: nn.Module) -> None:
    """Refuse diffusers' hooks that cut the graph or look at the user's pipeline during a call.

    Raises:
        UnsupportedError: naming the hook and what to do.
    """
    for name, _, hook_name, hook in hooks_of(module):
        cls: Any = type(hook)
        if hook_name in MOVING:
            group = getattr(hook, "group", None)
            if getattr(group, "offload_to_disk_path", None) is not None:
                raise UnsupportedError(
                    f"{key}.{name} keeps its weights on a disk (group offloading): load the pipeline again, and call "
                    "enable_group_offload without offload_to_disk_path"
                )
            continue
        advice = f"pipe.{key}.disable_cache(), or FirstBlockCacheConfig"
        if hasattr(hook, "current_timestep_callback"):
            raise UnsupportedError(
                f"{key} has the cache {hook_name}, which asks the pipeline itself for the time; that of the run is "
                f"another: {advice}"
            )
        methods = [m for m in ("new_forward", "pre_forward", "post_forward") if hasattr(cls, m)]
        if any(_CUTS & set(names(code)) for method in methods for _, code in reached(cls, method)):
            raise UnsupportedError(
                f"{key}.{name} has the hook {hook_name}, which cuts the gradient: {advice}"
            )
        if "parallel" in hook_name:
            raise UnsupportedError(
                f"{key}.{name} has the hook {hook_name}: a network that is split over devices is not "
                "differentiated; load it on one"
            )


def own_hooks(original: nn.Module, ours: nn.Module) -> None:
    """Give a shadow network hooks of its own in place of those it was copied with, which call the original."""
    from diffusers.hooks.hooks import HookRegistry

    memo: dict[int, Any] = {}
    for theirs, mine in zip(original.modules(), ours.modules(), strict=True):
        memo[id(theirs)] = mine
    for theirs, mine in zip(original.modules(), ours.modules(), strict=True):
        registry = theirs.__dict__.get("_diffusers_hook")
        if registry is None:
            continue
        mine.__dict__.pop("_diffusers_hook", None)
        chain: Any = HookRegistry(mine)
        kept = [name for name in registry._hook_order if name not in MOVING]
        if kept:
            mine.__dict__.pop("forward", None)
            mine.__dict__["_diffusers_hook"] = chain
        for hook_name in kept:
            chain.register_hook(_fresh(hook_name, registry.hooks[hook_name], memo), hook_name)


def own_casts(original: nn.Module, ours: nn.Module) -> None:
    """The same where weights are cast around their layers' calls, for copies of networks that have no other hooks."""
    if any(name == CASTING for _, _, name, _ in hooks_of(original)):
        own_hooks(original, ours)


def remembered(module: nn.Module) -> Remembered | None:
    """What the hooks of a network hold now; None for a network without hooks."""
    if not any("_diffusers_hook" in child.__dict__ for child in module.modules()):
        return None
    return Remembered(module)


class Remembered:
    """The hooks of a network and their state at one moment.

    Attributes:
        tensors: those of the state, to be handed to the call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._used = module, False
        self._layers = [_Layer(child) for child in module.modules() if "_diffusers_hook" in child.__dict__]
        managers = {id(m): m for layer in self._layers for m in layer.managers()}
        self._states = [
            (m, m._context, {k: (s, dict(vars(s))) for k, s in m._state_cache.items()})
            for m in managers.values()
        ]
        values = [{k: attributes for k, (_, attributes) in states.items()} for _, _, states in self._states]
        self.tensors, self._spec = pytree.tree_flatten(values)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` behind one more argument, the state that it is to find.

        The first run leaves its state to the next call; a later one puts back what was there.
        """

        @wraps(function)
        def with_state(tensors: list[Any], *args: Any, **kwargs: Any) -> Any:
            again, self._used = self._used, True
            now = Remembered(self._module) if again else None
            self._put(tensors)
            try:
                return function(*args, **kwargs)
            finally:
                if now is not None:
                    now._put(now.tensors)

        return with_state

    def _put(self, tensors: list[Any]) -> None:
        for layer in self._layers:
            layer.put()
        # What has no gradient is counted up in place by some caches: they get a copy to do that on.
        loose = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in tensors]
        values = pytree.tree_unflatten(loose, self._spec)
        for (manager, context, states), contents in zip(self._states, values, strict=True):
            manager._context = context
            manager._state_cache.clear()
            for key, (state, _) in states.items():
                vars(state).clear()
                vars(state).update(contents[key])
                manager._state_cache[key] = state


class _Layer:
    """One layer's chain of hooks: guidance methods put some on for single calls."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.registry = layer, layer.__dict__["_diffusers_hook"]
        self.forward = layer.__dict__.get("forward")
        self.hooks, self.order = dict(self.registry.hooks), list(self.registry._hook_order)
        self.links = [(ref, ref.forward) for ref in self.registry._fn_refs]

    def managers(self) -> Iterator[Any]:
        for hook in self.hooks.values():
            yield from (value for value in vars(hook).values() if hasattr(value, "_state_cache"))

    def put(self) -> None:
        if self.forward is not None:
            self.layer.__dict__["forward"] = self.forward
        else:
            self.layer.__dict__.pop("forward", None)
        self.registry.hooks, self.registry._hook_order = dict(self.hooks), list(self.order)
        self.registry._fn_refs = [ref for ref, _ in self.links]
        for ref, forward in self.links:
            ref.forward = forward


def _fresh(name: str, hook: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook with empty state; hooks that share their state share the copy of it."""
    ours = copy.copy(hook)
    ours.fn_ref = None
    if name == CASTING:
        kind: Any = type(hook)
        ours.__class__, ours.exchanged = upcasting(kind), []
    for key, value in vars(hook).items():
        if hasattr(value, "_state_cache"):
            if id(value) not in memo:
                memo[id(value)] = type(value)(value._state_cls, value._init_args, value._init_kwargs)
            setattr(ours, key, memo[id(value)])
        elif isinstance(value, nn.Module):
            setattr(ours, key, memo.get(id(value), value))
        elif key.endswith("state") and hasattr(value, "__dict__"):
            setattr(ours, key, copy.deepcopy(value, memo))
    return ours
