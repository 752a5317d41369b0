"""What a pipeline is made of, to compare before and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that a call could leave changed."""
    found: dict[str, Any] = {"class": type(pipe), "attributes": sorted(vars(pipe))}
    for key, value in vars(pipe).items():
        if isinstance(value, nn.Module):
            found[key] = {
                name: (id(p), p._version, p.data_ptr(), p.dtype, p.requires_grad, p.grad)
                for name, p in [*value.named_parameters(), *value.named_buffers()]
            }
            found[f"{key} modules"] = [
                (n, id(m), m.training, sorted(vars(m))) for n, m in value.named_modules()
            ]
        else:
            found[key] = (id(value), str(getattr(value, "__dict__", value)))
    return found
