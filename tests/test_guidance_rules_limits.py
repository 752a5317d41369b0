"""The rules of guidance at their limits: costs, singular ends, impossible numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from analytic_host import AnalyticHost, run
from backdrift.errors import InputError
from backdrift.guidance import Guidance, presets
from problems import SCHEDULES, GaussianNetwork, MixtureNetwork
from rules_by_hand import CASES, SEEDS, START, Case, by_hand, guided, loss


class Counted(MixtureNetwork):
    """Counts its calls, with and without a graph, and the backward passes through them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plain = self.graphs = self.backward = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out = super().forward(x, t, cond)
        if not out.requires_grad:
            self.plain += 1
            return out
        self.graphs += 1
        out.register_hook(self._pulled)
        return out

    def _pulled(self, grad: Tensor) -> None:
        self.backward += 1


def costs(guidance: Guidance) -> tuple[int, int, int, int]:
    """Of the one guided step of ten: network calls without a graph, with one, vector–Jacobian products, decodings."""
    network = Counted(SCHEDULES["linear"], "epsilon").requires_grad_(False)
    how = CASES["vp-epsilon"].how(slice(None)) | {"network": network, "uncond": None, "guidance_scale": 1.0}
    run(guidance, START, [0.9 - 0.09 * i for i in range(11)], **how)
    (entry,) = guidance.trace.entries
    counted = network.plain - 9, network.graphs, network.backward
    assert counted == (entry.calls.forward, entry.calls.redone, entry.calls.vjps)
    return *counted, entry.decodes


#: docs/guidance-rules.md has these numbers.
COSTS: dict[str, tuple[Callable[..., Guidance], tuple[int, int, int, int]]] = {
    "FreeDoM": (lambda **k: presets.FreeDoM(loss, **k), (1, 1, 1, 1)),
    "DPS": (lambda **k: presets.DPS(loss, **k), (1, 1, 1, 1)),
    "LGD, 10 samples": (lambda **k: presets.LGD(loss, **k), (1, 1, 1, 10)),
    "Universal Guidance, forward": (lambda **k: presets.UniversalGuidance(loss, **k), (1, 1, 1, 1)),
    "Universal Guidance, backward, 5 steps": (
        lambda **k: presets.UniversalGuidance(loss, 0.0, 5, **k),
        (1, 0, 0, 5),
    ),
    "Universal Guidance, both, 5 steps": (
        lambda **k: presets.UniversalGuidance(loss, 6.0, 5, **k),
        (1, 1, 1, 5),
    ),
    "MPGD": (lambda **k: presets.MPGD(loss, **k), (1, 0, 0, 1)),
    "MPGD, eps recomputed": (lambda **k: presets.MPGD(loss, 15.0, "recomputed", **k), (1, 0, 0, 1)),
    "TFG, 4 iterations": (lambda **k: presets.TFG(loss, **k), (1, 1, 1, 4)),
    "TFG, 4 iterations, 3 samples": (lambda **k: presets.TFG(loss, samples=3, **k), (1, 1, 1, 12)),
    "TFG, rho = 0, 4 iterations": (lambda **k: presets.TFG(loss, rho=0.0, **k), (1, 0, 0, 4)),
    "SAG, n = 4": (lambda **k: bd.SymplecticAdjointGuidance(loss, n=4, **k), (4, 4, 4, 1)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_a_guided_step(name: str) -> None:
    make, expected = COSTS[name]
    assert costs(make(steps=[2], repeats=1)) == expected


def test_the_docs_table_of_costs_is_what_was_counted() -> None:
    page = Path(__file__).parent.parent / "docs" / "guidance-rules.md"
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page.read_text(), re.MULTILINE)
    assert {name: tuple(map(int, numbers)) for name, *numbers in rows} == {
        name: expected for name, (_, expected) in COSTS.items()
    }


def test_dps_refuses() -> None:
    case = CASES["vp-epsilon"]
    with pytest.raises(InputError, match="maximize=True"):
        guided(case, presets.DPS(loss, maximize=True))
    with pytest.raises(InputError, match="a loss of -"):
        guided(case, presets.DPS(lambda pictures: -loss(pictures)))


def test_dps_leaves_alone_what_is_at_its_best() -> None:
    case = CASES["vp-epsilon"]

    def zero(pictures: Tensor) -> Tensor:
        return 0 * pictures.flatten(1).square().sum(1)

    torch.testing.assert_close(
        guided(case, presets.DPS(zero)),
        by_hand(case, lambda hand, x, i: hand.ddim(x, hand.eps(x, i), i)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_pure_noise_is_refused_where_the_rule_is_singular_there() -> None:
    times, flow = (1.0, 0.7, 0.4, 0.0), SCHEDULES["flow"]
    how = Case("flow", "flow_prediction", False, times).how(slice(None))
    how |= {"network": GaussianNetwork(flow, "flow_prediction").requires_grad_(False)}  # regular at alpha = 0
    for guidance in (presets.UniversalGuidance(loss, 0.5, repeats=1), presets.TFG(loss)):
        with pytest.raises(InputError, match="begins at pure noise"):
            run(guidance, START, times, **how)
    for guidance in (
        presets.FreeDoM(loss, start=0.0),
        presets.DPS(loss),
        presets.LGD(loss),
        presets.MPGD(loss, start=0.0),
    ):
        assert bool(run(guidance, START, times, **how)[-1].isfinite().all())


def test_tfg_refuses_a_schedule_over_levels_that_the_host_does_not_tell() -> None:
    case = CASES["vp-epsilon"]
    guidance = presets.TFG(loss, seed=SEEDS)
    guidance.begin(4, 3)
    host = AnalyticHost(times=case.times, index=0, x=START, **case.how(slice(None)))
    host.levels = None
    with pytest.raises(InputError, match="does not tell the noise levels"):
        guidance.advance(host)


@pytest.mark.parametrize(
    "make",
    [
        lambda: presets.DPS(loss, 0.0),
        lambda: presets.DPS(loss, math.nan),
        lambda: presets.LGD(loss, samples=0),
        lambda: presets.LGD(loss, spread=-1.0),
        lambda: presets.UniversalGuidance(loss, 0.0, 0),
        lambda: presets.UniversalGuidance(loss, 1.0, 1, rate=0.0),
        lambda: presets.MPGD(loss, eps="other"),  # type: ignore[arg-type]
        lambda: presets.TFG(loss, 0.0, 0.0),
        lambda: presets.TFG(loss, iterations=0),
        lambda: presets.TFG(loss, rho_schedule="up"),  # type: ignore[arg-type]
        lambda: presets.TFG(loss, gamma_schedule="increase"),  # type: ignore[arg-type]
        lambda: presets.FreeDoM(loss, -1.0),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[[], Guidance]) -> None:
    with pytest.raises(InputError, match=r"got|does nothing"):
        make()


def test_the_presets_are_public() -> None:
    for name in ("FreeDoM", "DPS", "LGD", "UniversalGuidance", "MPGD", "TFG"):
        assert issubclass(getattr(bd.guidance, name), Guidance)
