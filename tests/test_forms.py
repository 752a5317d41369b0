"""The three forms are one ODE: on exact data their drifts are the derivative of the known solution."""

from __future__ import annotations

import math

import pytest
import torch

from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.forms import FORMS, Form
from backdrift.predictions import PREDICTIONS
from backdrift.schedules import VP, Flow
from problems import SCHEDULES, GaussianNetwork, condition, start_state

TIMES = {"linear": 0.4, "cosine": 0.5, "discrete": 431.7, "edm": 2.3, "flow": 0.37}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form_name", FORMS)
def test_drift_is_the_solutions_derivative(form_name: str, name: str, prediction: str) -> None:
    schedule, t = SCHEDULES[name], TIMES[name]
    network = GaussianNetwork(schedule, prediction)
    model = Denoiser(network, schedule, prediction)
    x, c = start_state(schedule, t), condition()
    form = Form(form_name, schedule, prediction, lambda x, t: model.output(x, t, c))
    s, h = form.node(t).s, 1e-5 * form.node(t).s
    with torch.no_grad():
        ends = []
        for clock in (s + h, s - h):
            node = form.between(clock)
            assert form.node(node.t).s == pytest.approx(clock, rel=1e-12)
            ends.append(network.solution(x, c, t, node.t) / form.scale(node.t))
        numeric = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(form.drift(x, t), numeric, rtol=1e-7, atol=1e-8)


def test_original_form_is_the_papers_expression() -> None:
    schedule, t = SCHEDULES["linear"], 0.3
    model = Denoiser(GaussianNetwork(schedule, "epsilon"), schedule)
    x, c = start_state(schedule, t), condition()
    form = Form("original", schedule, "epsilon", lambda x, t: model.output(x, t, c))
    expected = schedule.f(t) * x + schedule.g2(t) / (2 * schedule.sigma(t)) * model(x, t, c)
    torch.testing.assert_close(form.drift(x, t), expected, rtol=1e-12, atol=1e-12)


def test_forms_step_aside_where_they_are_singular() -> None:
    def name(form: str, schedule: object, prediction: str, start: float, end: float) -> str:
        return Form(form, schedule, prediction).aside(start, end).name  # type: ignore[arg-type]

    assert name("exponential", Flow(), "flow_prediction", 1.0, 0.5) == "original"
    assert name("data", Flow(), "flow_prediction", 0.5, 0.0) == "original"
    assert name("data", Flow(), "flow_prediction", 0.5, 0.1) == "data"
    assert name("exponential", VP.cosine(), "v_prediction", 1.0, 0.5) == "data"
    assert name("data", VP.cosine(), "epsilon", 0.5, 0.0) == "exponential"
    assert name("exponential", VP.cosine(), "epsilon", 0.5, 0.0) == "exponential"
    with pytest.raises(InputError, match="at least 2 steps"):
        name("exponential", VP.cosine(), "v_prediction", 1.0, 0.0)
    with pytest.raises(InputError, match="t = 1"):
        name("exponential", VP.cosine(), "epsilon", 1.0, 0.5)


def test_infinite_drifts_are_refused() -> None:
    with pytest.raises(InputError, match="infinite at t = 0"):
        Form("original", VP.linear(), "v_prediction").coefficients(0.0)
    assert math.isfinite(sum(Form("original", Flow(), "flow_prediction").coefficients(0.0)))
    with pytest.raises(InputError, match="original, exponential, data"):
        Form("euler", Flow(), "epsilon")
    with pytest.raises(InputError, match="no model"):
        Form("original", Flow(), "flow_prediction").drift(torch.zeros(1), 0.5)
