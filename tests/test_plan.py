"""The planner: counted bytes against closed forms, published sizes and measured runs; the search; the command."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import backdrift as bd
from backdrift.blocks import LEVELS
from backdrift.cli import app
from backdrift.errors import BudgetError, InputError
from backdrift.pipelines.configured import configured, known
from backdrift.planning.choices import Choices, candidates
from backdrift.planning.job import Component, Job, Kind, Loss, Moment
from backdrift.planning.plan import make_plan
from backdrift.planning.profile import Guests, Profile, Streamed, profile
from backdrift.planning.timeline import FLOPS_PER_BYTE, estimate
from backdrift.residence import Residence, layers
from small_jobs import PIPELINES, call_of, measured
from tiny_pipelines import tiny_sd

MIB = 2**20


# ---------------------------------------------------------------------------- one call, closed forms


def meta(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def test_a_chain_of_linear_layers() -> None:
    """SiLU saves its input, a frozen linear layer nothing: n activations; two more while one is differentiated."""
    rows, width, n = 128, 64, 5
    with torch.device("meta"):
        chain = nn.Sequential(*(m for _ in range(n) for m in (nn.Linear(width, width), nn.SiLU())))
    chain.requires_grad_(False)
    x = meta(rows, width)
    found = profile(lambda: chain(x), [x])
    one, product = rows * width * 4, 2 * rows * width * width
    assert found == Profile(n * one, (n + 1) * one, (n + 1) * one, n * product, n * product)


def test_weights_that_are_trained_save_their_inputs() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = meta(128, 64)
    found = profile(lambda: layers(x), [x, *layers.parameters()])
    assert (
        found.saved == 128 * 64 * 4
    )  # tanh's output is the second layer's input; the first one's exists anyway
    assert found.backward_flops == 2 * found.forward_flops


def test_attention_saves_what_a_fused_kernel_saves() -> None:
    batch, heads, n, d = 2, 3, 128, 16
    q, k, v = (meta(batch, heads, n, d) for _ in range(3))
    found = profile(lambda: nn.functional.scaled_dot_product_attention(q, k, v), [q, k, v])
    assert found.saved == batch * heads * n * (d + 1) * 4  # the output, and one number per row
    assert found.forward_flops == 4 * batch * heads * n * n * d


@pytest.mark.parametrize("between", [nn.Identity, nn.Tanh])
def test_weights_that_come_and_go_are_counted_apart(between: Any) -> None:
    """Two layers of 64 x 64: their weights come one after the other, forward and backward, and leave nothing behind."""
    with torch.device("meta"):
        chain = nn.Sequential(nn.Linear(64, 64, bias=False), between(), nn.Linear(64, 64, bias=False))
    chain.requires_grad_(False)
    x = meta(128, 64)
    alone = profile(lambda: chain(x), [x])
    guests = Guests()
    call = Residence(chain, "network", guests, layers(chain)).around(chain.forward)
    found = profile(lambda: call(x), [x], guests=guests)
    assert replace(found, streamed=Streamed()) == alone
    one, act = 64 * 64 * 4, 128 * 64 * 4
    # Forward the second layer, which holds its argument and its result, is as high as tanh. Backward a layer holds two
    # gradients, tanh its result besides: its peak has no weights beside it, and is higher than theirs.
    assert found.forward == 2 * act
    assert found.backward == (3 if between is nn.Tanh else 2) * act
    assert found.streamed == Streamed(one, 0 if between is nn.Tanh else one, one, 2 * one, 2 * one)
    assert guests.nbytes == 0


def test_the_published_decoder_at_full_size() -> None:
    """SDXL's decoder of 1024 x 1024 pictures is known to save 22 GiB in float32."""
    vae = configured("sdxl", torch.float32)[0].vae.requires_grad_(False)
    z = meta(1, 4, 128, 128)
    assert profile(lambda: vae.decode(z).sample, [z]).saved / 2**30 == pytest.approx(22.2, abs=0.1)


# ---------------------------------------------------------------------------- shipped configurations

# Parameters as the models' authors and the libraries' documentation count them.
PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "sd3-medium": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656},
    "flux-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configurations_have_the_published_number_of_weights(name: str) -> None:
    pipe, size = configured(name, torch.bfloat16)
    assert size == (512 if name == "sd15" else 1024)
    for part, count in PUBLISHED[name].items():
        module = getattr(pipe, part)
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(count, rel=1e-3)
        assert all(p.is_meta for p in module.parameters())


def test_hub_ids_are_known_and_others_say_what_is() -> None:
    assert known()["stabilityai/stable-diffusion-xl-base-1.0"] == known()["sdxl"]
    with pytest.raises(InputError, match=r"Did you mean 'sdxl'.*sd15.*folder"):
        bd.plan("sdxxl")


def test_a_folder_is_planned_like_the_pipeline_that_was_saved(tmp_path: Any) -> None:
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()  # weights are not needed
    ours, theirs = (bd.plan(p, 32, 32, 3, **d) for p, d in ((pipe, {}), (tmp_path, {"dtype": "float32"})))
    assert ours.needs == theirs.needs
    assert ours.chosen == theirs.chosen


# ---------------------------------------------------------------------------- against measured runs


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("memory", ["max", "min"])
def test_the_estimate_is_within_ten_percent_of_the_measured_peak(name: str, memory: str) -> None:
    pipe = PIPELINES[name]()
    call = call_of(pipe, 3)
    choices = Choices(keep=0 if memory == "min" else None)
    plan = bd.plan(pipe, **call, choices=choices)
    weights = sum(c.weights for c in plan.job.components)
    assert plan.peak - weights == pytest.approx(measured(pipe, call, memory=memory), rel=0.1)


def test_the_calls_of_a_sampler_that_calls_twice_a_step_are_counted() -> None:
    from diffusers import HeunDiscreteScheduler, PNDMScheduler

    pipe = tiny_sd()
    for scheduler, calls in ((HeunDiscreteScheduler, 7), (PNDMScheduler, 5)):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        assert bd.plan(pipe, 16, 16, 4).job.network_calls == calls


def test_guidance_batch_and_training_are_counted() -> None:
    pipe = tiny_sd()
    plain = bd.plan(pipe, 32, 32, 2)
    alone, two = bd.plan(pipe, 32, 32, 2, guidance=False), bd.plan(pipe, 32, 32, 2, batch=2)
    key = "activations of one call of unet"
    assert alone.needs[key] == pytest.approx(plain.needs[key] / 2, rel=0.01)
    assert two.needs[key] == pytest.approx(2 * plain.needs[key], rel=0.01)
    trained = bd.plan(pipe, 32, 32, 2, train="unet")
    assert trained.needs["gradients of weights"] == trained.needs["weights: unet"]
    assert trained.needs["optimizer state"] == 2 * trained.needs["weights: unet"]
    assert "optimizer state" not in bd.plan(pipe, 32, 32, 2, train="unet", optimizer="sgd").needs


def test_lora_is_counted_on_a_model_without_adapters() -> None:
    plan = bd.plan("sd", 32, 32, 2, train="lora", rank=2, dtype="float32")
    unet = configured("sd", torch.float32)[0].unet
    layers = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert plan.needs["gradients of weights"] == sum(4 * 2 * (m.in_features + m.out_features) for m in layers)


def test_a_loss_network_is_counted() -> None:
    plan = bd.plan(tiny_sd(), 32, 32, 2, loss="clip-vit-base-patch32")
    assert plan.needs["weights: clip-vit-base-patch32"] / 4 == pytest.approx(87_849_216, rel=1e-3)
    assert plan.job.loss is not None
    assert plan.job.loss.profile.saved > 10 * MIB
    assert bd.plan(tiny_sd(), 32, 32, 2, loss="clip:a two").needs["activations of clip:a two"] > 0


def test_a_loss_that_cannot_be_counted_is_said() -> None:
    hidden = nn.Linear(3, 1)
    plan = bd.plan(tiny_sd(), 16, 16, 1, loss=lambda images: hidden(images.mean((2, 3)))[:, 0])
    assert "leave room" in " ".join(plan.why)


# ---------------------------------------------------------------------------- the timeline, closed forms


def kind(component: str, role: Any, saved: int, more: int = 0, flops: int = 10, rows: int = 1) -> Kind:
    def measure(level: Any, tiled: bool) -> Profile:
        share = {"whole": 1, "block": 4, "resnet": 8}[level]
        redo = 0 if level == "whole" else flops
        streamed = Streamed(5, 6, 30, 300, 300 + (0 if level == "whole" else 300))
        most = saved // share + more
        return Profile(saved // share, most, most, flops, 2 * flops + redo, streamed)

    return Kind(component, role, rows, 0, measure)


def made_job(n: int = 4, loss: Loss | None = None, rows: int = 2, state: int = 0, trained: int = 0) -> Job:
    """n calls of a network that saves 1000, one of a decoder that saves 1600, latents of 10 a call."""
    network, decoder = (
        kind("net", "network", 1000, 50, rows=rows),
        kind("vae", "decoder", 1600, 80, rows=rows // 2),
    )
    forward = [Moment(i, 10 * (i + 1), 10 * (i + 1)) for i in range(n + 1)]
    backward = [Moment(i, 10 * i, 10 * i) for i in reversed(range(n + 1))]
    parts = (Component("net", 300, trained), Component("vae", 100), Component("text", 200))
    return Job(
        "Made",
        parts,
        (*[network] * n, decoder),
        tuple(forward),
        tuple(backward),
        10 * n,
        (*[10] * n, 0),
        loss,
        state,
    )


def test_everything_kept() -> None:
    needs = estimate(made_job(), Choices())
    assert needs.phases["sampling"] == 600 + 3 * 1000 + 40 + 1050
    assert needs.phases["loss"] == 600 + 4 * 1000 + 1600 + 40
    assert needs.phases["decoder backward"] == 600 + 4 * 1000 + 40 + 1680
    assert needs.peak == needs.phases["decoding"] == 600 + 4 * 1000 + 50 + 1680
    assert (needs.calls, needs.redone, needs.cost) == (4, 0, 5 * 30)


@pytest.mark.parametrize(
    ("keep", "sampling", "decoding"), [(0, 1050, 1680), (1, 1050, 2680), (3, 3050, 4680)]
)
def test_some_kept(keep: int, sampling: int, decoding: int) -> None:
    needs = estimate(made_job(), Choices(keep=keep))
    assert needs.phases["sampling"] == 600 + 40 + sampling
    assert needs.phases["decoding"] == 600 + 50 + decoding
    assert (needs.redone, needs.cost) == (4 - keep, 5 * 30 + 10 * (4 - keep))


def test_each_choice_takes_away_its_part() -> None:
    job = made_job(loss=Loss("loss", 70, 1, Profile(400, 500, 600, 1, 2)), state=33, trained=20)
    keep = Choices(keep=0)
    base = 670 + 33
    assert estimate(job, keep).phases["network backward"] == base + 20 + 30 + 1050
    assert estimate(job, replace(keep, network="block")).phases["network backward"] == base + 20 + 30 + 300
    assert estimate(job, replace(keep, guidance="apart")).phases["network backward"] == base + 20 + 30 + 525
    assert estimate(job, replace(keep, latents="cpu")).phases["network backward"] == base + 20 + 1050
    assert estimate(job, replace(keep, decoder="resnet")).phases["decoder backward"] == base + 40 + 280
    # The optimizer's state waits with the weights.
    offload = estimate(job, replace(keep, weights="offload"))
    assert offload.phases["network backward"] == 300 + 70 + 20 + 30 + 1050
    assert offload.phases["decoder backward"] == 100 + 70 + 40 + 1680
    # Layer by layer: the largest brings 30, where the call's own peak is it is 5 or 6.
    stream = estimate(job, replace(keep, weights="stream"))
    assert stream.phases["network backward"] == 70 + 30 + 1050 + 6
    assert stream.phases["sampling"] == 70 + 40 + 1050 + 5
    apart = estimate(job, replace(keep, weights="stream", guidance="apart"))
    assert apart.phases["network backward"] == 70 + 30 + 525 + 30
    assert estimate(job, keep).phases["loss"] == base + 1600 + 40 + 600


def test_samples_decoded_and_scored_one_by_one() -> None:
    job = made_job(loss=Loss("loss", 0, 4, Profile(400, 500, 600, 100, 200)), rows=8)
    apart = estimate(job, Choices(keep=0, decode="sample", loss=1))
    assert apart.phases["decoder backward"] == 600 + 40 + 1680 // 4
    assert apart.phases["loss"] == 600 + 1600 // 4 + 40 + 150


# ---------------------------------------------------------------------------- the search


def exhaustive(job: Job, budget: int) -> float | None:
    """The least cost of everything that fits, by trying all of it."""
    keeps: list[int | None] = [None, *range(job.network_calls + 1)]
    tactics = list(candidates(job))
    for some in ([c for c in tactics if c.weights != "stream"], tactics):  # weights layer by layer come last
        options = (estimate(job, replace(c, keep=k)) for c, k in itertools.product(some, keeps))
        best = min((o.cost for o in options if o.peak <= budget), default=None)
        if best is not None:
            return best
    return None


@pytest.mark.parametrize("budget", [1300, 1700, 2300, 2600, 3300, 4000, 5300, 6400, 9999])
def test_the_fastest_way_that_fits_is_found(budget: int) -> None:
    job = made_job(n=5)
    best = exhaustive(job, budget)
    assert best is not None
    plan = make_plan(job, budget)
    assert plan.chosen.needs.cost == best
    assert plan.peak <= budget


@pytest.mark.parametrize("budget", [1700, 2300, 2600, 3300, 4000, 5300])
def test_the_next_faster_way_is_just_that(budget: int) -> None:
    job = made_job(n=5)
    plan = make_plan(job, budget)
    named = int(re.findall(r"The next faster way needs .*?(\d+) bytes", str(plan))[0])
    assert named > budget
    assert make_plan(job, named).chosen.needs.cost < plan.chosen.needs.cost
    assert make_plan(job, named - 1).chosen.needs.cost == plan.chosen.needs.cost


def test_the_smallest_budget_that_is_named_works_and_one_byte_less_does_not() -> None:
    job = made_job(n=5)
    with pytest.raises(BudgetError, match="smallest budget that works is") as error:
        make_plan(job, 10)
    named = int(str(error.value).split("smallest budget that works is ")[1].split(" ")[0])
    assert exhaustive(job, named) is not None
    assert exhaustive(job, named - 1) is None
    with pytest.raises(BudgetError):
        make_plan(job, named - 1)


def test_where_weights_cannot_be_moved_yet_what_moving_them_would_make_possible_is_said() -> None:
    job = made_job(n=5)
    with pytest.raises(BudgetError, match=r"after pipe\.enable_model_cpu_offload\(\) (\d+) bytes") as error:
        make_plan(job, 10, offload=False, park=True)
    named = int(str(error.value).split("cpu_offload() ")[-1].split(" ")[0])
    assert make_plan(job, named, offload=False, offloaded=True, park=True).choices.weights == "stream"
    with pytest.raises(BudgetError):
        make_plan(job, named - 1, offload=False, offloaded=True, park=True)
    with pytest.raises(BudgetError) as error:
        make_plan(job, 10, offload=False)
    assert "enable_model_cpu_offload() " not in str(error.value)


def test_options_are_fastest_first_and_ever_smaller() -> None:
    options = make_plan(made_job(n=8)).options
    for faster, smaller in itertools.pairwise(options):
        assert faster.needs.cost <= smaller.needs.cost
        assert faster.needs.peak > smaller.needs.peak
    assert options[0].choices == Choices()


def test_levels_are_all_tried() -> None:
    found = {c.network for c in candidates(made_job())}
    assert found == set(LEVELS)
    assert not any(c.weights != "device" or c.latents == "cpu" for c in candidates(made_job(), offload=False))
    assert {c.weights for c in candidates(made_job())} == {"device", "offload", "stream"}
    assert {c.weights for c in candidates(made_job(), offload=False, offloaded=True)} == {"offload", "stream"}


def test_weights_come_layer_by_layer_only_where_nothing_else_fits() -> None:
    job = made_job(n=5)
    whole = [c for c in candidates(job) if c.weights != "stream"]
    least = min(estimate(job, replace(c, keep=0)).peak for c in whole)
    assert make_plan(job, least).choices.weights == "offload"
    plan = make_plan(job, least - 1)
    assert plan.choices.weights == "stream"
    assert plan.peak < least
    assert "layer" in str(plan)
    # Every call brings 300, once more when it is redone, and 300 or 600 when it is differentiated.
    calls, redone = 6, plan.chosen.needs.redone + 1
    again = 300 if plan.choices.network != "whole" else 0
    decoder = 300 if plan.choices.decoder != "whole" else 0
    parts = 2 if plan.choices.guidance == "apart" else 1
    moved = plan.chosen.needs.cost
    assert plan.choices.latents == "device" or moved > 0
    assert moved > FLOPS_PER_BYTE * 300 * (calls + redone)
    assert moved < FLOPS_PER_BYTE * (parts * 5 * (900 + again) + 900 + decoder + 2 * 50) + 10**4


# ---------------------------------------------------------------------------- what is said


def test_a_plan_says_what_it_chose_and_why() -> None:
    plan = make_plan(made_job(n=5), 2600)
    text = str(plan)
    assert "Plain autograd would need" in text
    assert f"the last {plan.choices.keep} keep" in text
    assert json.loads(json.dumps(plan.as_dict()))["chosen"]["peak"] == plan.peak
    assert "Everything is kept" in str(make_plan(made_job(), 10**6))


def test_the_command_prints_tables_and_json() -> None:
    command = ["plan", "sd", "--size", "32", "--steps", "4", "--budget", "64MiB"]
    text = CliRunner().invoke(app, command).output
    assert "activations of one call of unet" in text
    assert "Chosen" in text
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["chosen"]["fits"] is True
    assert found["plain"]["network_calls"] == 4
    assert found["budget"] == 64 * MIB


def test_the_command_names_the_smallest_budget() -> None:
    result = CliRunner().invoke(app, ["plan", "sd", "--size", "32", "--steps", "4", "--budget", "99KiB"])
    assert result.exit_code == 2
    assert "smallest budget that works" in result.output


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "lion"}, {"batch": 0}, {"dtype": "float32"}, {"loudness": 3}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        bd.plan(tiny_sd(), 16, 16, 2, **wrong)
    with pytest.raises(InputError, match="height=0"):
        bd.plan("sd", 0, 64, 2)
