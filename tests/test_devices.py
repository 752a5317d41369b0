"""Devices other than the CPU: what is asked of them, and whole runs on one in software (:mod:`card`).

On that device a kernel that is given tensors of both devices raises, autograd's backward passes run in a thread of
their own, and random numbers come from a generator of its own. Runs are made in processes of their own
(:mod:`on_a_card`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backdrift import accelerators, losses, parking
from backdrift.ambient import Ambient, full_precision
from backdrift.budget import available_bytes
from backdrift.cli.pipeline import devices, find_device
from backdrift.errors import InputError
from backdrift.record import machine

CPU, HERE = torch.device("cpu"), Path(__file__).parent


@pytest.mark.parametrize("room", ["sample", "pipelines", "above"])
def test_whole_runs_on_another_device(room: str) -> None:
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch lets no device be made in Python")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(HERE / "on_a_card.py"), room], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 3
    wrong = {name: problem for name, problem in found.items() if problem is not None}
    assert not wrong, "\n".join(f"{name}:\n{problem}" for name, problem in wrong.items())


# ---- settings of the process ----------------------------------------------------------------------------

_NEWER = hasattr(torch._C, "_get_fp32_precision_getter")


@pytest.fixture
def precision() -> Any:
    """TF32 may be set in two ways; what a test sets is put back."""
    kept = Ambient([])
    with kept.restored():
        yield


@pytest.mark.skipif(not _NEWER, reason="older settings only")
@pytest.mark.parametrize("where", ["matmul", "conv", "rnn"])
def test_tf32_set_for_one_kind_of_operation_is_seen_and_put_back(where: str, precision: Any) -> None:
    """PyTorch refuses to read its older settings where matrix products alone are set by the newer ones."""

    def read() -> str:
        return torch._C._get_fp32_precision_getter("cuda", where)

    before = read()
    other = "ieee" if before == "tf32" else "tf32"
    torch._C._set_fp32_precision_setter("cuda", where, other)
    then = Ambient([])
    torch._C._set_fp32_precision_setter("cuda", where, before)
    assert not then.same_as(Ambient([]))
    with then.restored():
        assert read() == other
    assert read() == before


@pytest.mark.skipif(not _NEWER, reason="older settings only")
def test_what_holds_for_all_operations_goes_on_holding_for_each(precision: Any) -> None:
    """Putting a setting back does not fix what followed another one."""
    general, own = ("generic", "all"), ("cuda", "matmul")
    torch._C._set_fp32_precision_setter(*own, "none")
    torch._C._set_fp32_precision_setter(*general, "tf32")
    then = Ambient([])
    torch._C._set_fp32_precision_setter(*general, "ieee")
    with then.restored():
        assert torch._C._get_fp32_precision_getter(*own) == "tf32"
    torch._C._set_fp32_precision_setter(*general, "tf32")
    assert torch._C._get_fp32_precision_getter(*own) == "tf32"
    torch._C._set_fp32_precision_setter(*general, "none")


def test_the_older_precision_of_matrix_products_is_put_back(precision: Any) -> None:
    torch.set_float32_matmul_precision("high")
    then = Ambient([])
    torch.set_float32_matmul_precision("highest")
    with then.restored():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_determinism_that_only_warns_is_put_back_as_that(precision: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    then = Ambient([])
    torch.use_deterministic_algorithms(False)
    with then.restored():
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "name", ["fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation"]
)
def test_how_matrix_products_add_in_half_precision_is_put_back(name: str, precision: Any) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(torch._C, f"_get_cublas_allow_{name}"):
        pytest.skip("not in this PyTorch")
    before = getattr(matmul, f"allow_{name}")
    setattr(matmul, f"allow_{name}", not before)
    then = Ambient([])
    setattr(matmul, f"allow_{name}", before)
    with then.restored():
        assert getattr(matmul, f"allow_{name}") != before
    assert getattr(matmul, f"allow_{name}") == before


def test_without_tf32_means_none_of_it_and_leaves_settings_as_they_were(precision: Any) -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        if _NEWER:
            found = {torch._C._get_fp32_precision_getter("cuda", op) for op in ("matmul", "conv", "rnn")}
            assert found <= {"ieee", "none"}
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "medium"


# ---- what devices are asked ------------------------------------------------------------------------------


class Cards:
    """A module like ``torch.cuda`` of two cards, in numbers."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1, 2]), torch.tensor([3, 4])]
        self.seeds: list[int] = []
        self.started = True

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.started

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 2

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.states[device.index].clone()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[device.index] = state

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)
        self.states = [torch.tensor([seed, i]) for i in range(2)]

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return (1000, 5000)[:: 1 if device.index == 0 else -1]  # type: ignore[return-value]

    def memory_reserved(self, device: torch.device) -> int:
        return 700

    def memory_allocated(self, device: torch.device) -> int:
        return 300

    def get_device_name(self, device: torch.device) -> str:
        return f"card {device.index}"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    found = Cards()
    monkeypatch.setattr(torch, "xpu", found)
    return found


def test_every_device_s_random_numbers_go_on_after_a_seeded_block(cards: Cards) -> None:
    torch.manual_seed(3)
    cards.states = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    expected = torch.rand(2)
    torch.default_generator.manual_seed(3)
    with accelerators.seeded(9):
        assert cards.seeds[-1] == 9
        inside = torch.rand(2)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(torch.rand(2), expected)
    assert [state.tolist() for state in cards.states] == [[1, 2], [3, 4]]


def test_devices_that_sleep_are_not_seeded(cards: Cards) -> None:
    """Their seed would wait for them, and replace the user's."""
    cards.started = False
    with accelerators.seeded(9):
        pass
    assert cards.seeds == []


def test_a_call_s_random_state_is_that_of_all_its_devices(cards: Cards) -> None:
    """Arguments on one card, weights on another."""
    first, second = torch.device("xpu", 0), torch.device("xpu", 1)
    then = Ambient([torch.zeros(1)], {second, first})
    cards.states = [torch.tensor([7, 7]), torch.tensor([8, 8])]
    with then.restored():
        assert [state.tolist() for state in cards.states] == [[1, 2], [3, 4]]
    assert [state.tolist() for state in cards.states] == [[7, 7], [8, 8]]


def test_auto_asks_the_card_itself(cards: Cards) -> None:
    assert available_bytes(torch.device("xpu", 0)) == int(0.8 * (1000 + 700 - 300))
    assert available_bytes(torch.device("xpu", 1)) == int(0.8 * (5000 + 700 - 300))


def test_auto_on_a_shared_memory_is_no_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(recommended_max_memory=lambda: 2**60, current_allocated_memory=lambda: 2**20)
    monkeypatch.setattr(torch, "mps", memory)
    apple = torch.device("mps")
    assert available_bytes(apple) <= available_bytes(CPU) * 1.1
    memory.recommended_max_memory = lambda: 2**21
    assert available_bytes(apple) == int(0.8 * 2**20)
    assert not accelerators.has_float64(apple)


def test_a_loss_goes_to_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "WITHOUT_FLOAT64", {"meta"})
    loss = losses.resolve("colour:#2060c0")
    loss._follow(torch.device("meta"))
    goal = dict(loss.named_buffers())["goal"]
    assert (goal.device.type, goal.dtype) == ("meta", torch.float32)


def test_a_record_names_the_device_of_the_work(cards: Cards) -> None:
    assert machine(torch.device("xpu", 1))["device"] == "card 1"
    assert machine(CPU)["device"] == machine()["device"] == "cpu"


def test_parked_arguments_do_without_pinned_memory(monkeypatch: pytest.MonkeyPatch, cards: Cards) -> None:
    """There is less of it than there is memory, and what is parked may be all latents of a run."""
    asked: list[bool] = []
    empty = torch.empty_strided

    def refusing(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_strided", refusing)
    monkeypatch.setattr(parking, "module_of", lambda device: cards)
    x = torch.randn(3, 4).t()
    kept = parking.to_host(x)
    assert asked == [True, False]
    assert torch.equal(kept, x)
    assert kept.stride() == x.stride()


# ---- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "xpu", "meta", "gpu"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    if name in devices() or (name == "cuda" and torch.cuda.is_available()):
        pytest.skip("it is there")
    with pytest.raises(InputError, match=f"{name}.*not available here; there are: .*cpu"):
        find_device(name)


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="built for GPUs")
def test_a_pytorch_for_the_cpu_alone_is_named_as_the_reason() -> None:
    with pytest.raises(InputError, match="built for the CPU alone"):
        find_device("cuda")
    assert find_device("auto") == CPU
