"""A pipeline examined by the doctor: what every sound one must show, and what it is made of before and after."""

from __future__ import annotations

from typing import Any

from torch import nn

import backdrift as bd

MEASURED = ("finite", "beside plain autograd", "by the noise")


def examine(pipe: Any, *, embeddings: bool = True, draws: bool = False) -> Any:
    """The checkup of a pipeline that is right, asserted to be so, and to have left it as it was.

    Args:
        embeddings: it takes embeddings, made up or encoded.
        draws: it draws its noise itself.
    """
    before = state_of(pipe)
    checkup = bd.doctor(pipe, directions=1)
    assert state_of(pipe) == before
    assert checkup.ok, checkup.table()
    for title in MEASURED:
        assert checkup[title].status == "ok", checkup.table()
    assert checkup["beside plain autograd"].figures["relative difference"] == 0.0
    assert checkup["by the embeddings"].status == ("ok" if embeddings else "skipped"), checkup.table()
    assert checkup["noise"].status == ("handled" if draws else "ok")
    assert checkup["30 steps"].figures["smallest"] <= checkup["30 steps"].figures["max"]
    return checkup


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
