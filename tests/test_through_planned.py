"""A budget with `through=`: what is planned is the truncated run, in bytes and in calls."""

from __future__ import annotations

import pytest
import torch

from small_jobs import PIPELINES, call_of, gradients, measured


@pytest.mark.parametrize("through", ["steps:0,2", "steps:-1"])
def test_the_truncated_run_is_what_is_planned(through: str) -> None:
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 4)
    plain, run = gradients(pipe, call, memory="max", through=through)
    chosen = len(run.trace.steps or ())
    assert (run.stats.calls_forward, run.stats.vjps) == (4, chosen)

    _, run = gradients(pipe, call, memory=10**12, through=through)
    assert run.plan is not None
    weights = run.plan.job.weights
    used = measured(pipe, call, memory="max", through=through)
    assert run.plan.plain.needs.peak - weights == pytest.approx(used, rel=0.1)
    assert used < 0.8 * measured(pipe, call, memory="max")

    least, most = run.plan.least.needs.peak, run.plan.plain.needs.peak
    for share in (0.02, 0.5):
        budget = int(least + share * (most - least))
        found, run = gradients(pipe, call, memory=budget, through=through)
        assert run.plan is not None
        assert run.stats.calls_redone == run.plan.chosen.needs.redone <= chosen
        assert measured(pipe, call, memory=budget, through=through) + weights <= 1.1 * budget
        if run.plan.choices.guidance == "together":
            assert torch.equal(found[0], plain[0])
        else:
            torch.testing.assert_close(found[0], plain[0], rtol=1e-3, atol=1e-7)
