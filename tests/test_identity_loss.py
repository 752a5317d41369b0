"""The face-identity loss against the few lines that define it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from backdrift import losses
from backdrift.errors import InputError
from tiny_losses import pictures, slopes, tiny_faces


def test_distances_are_those_of_unit_embeddings() -> None:
    network = tiny_faces().double()
    reference, images = pictures(1, 112, seed=3), pictures(2, 112)
    u, v = (nn.functional.normalize(network(2 * x - 1), dim=1) for x in (images, reference))
    got = losses.Identity(reference, network)(images)
    torch.testing.assert_close(got, (u - v).square().sum(1).sqrt(), rtol=1e-9, atol=0)
    cosine = losses.Identity(reference, network, "cosine")(images)
    torch.testing.assert_close(cosine, 1 - (u * v).sum(1), rtol=1e-9, atol=0)
    spherical = losses.Identity(reference, network, "spherical")(images)
    torch.testing.assert_close(spherical, torch.arccos((u * v).sum(1)).square() / 2, rtol=1e-7, atol=0)


def test_the_box_is_what_is_seen() -> None:
    network = tiny_faces().double()
    reference, face = pictures(1, 112, seed=3), pictures(1, 112)
    large = torch.rand(1, 3, 224, 448, dtype=torch.float64)
    large[..., 56:168, 112:224] = face
    boxed = losses.Identity(reference, network, box=(0.25, 0.25, 0.75, 0.5))(large)
    torch.testing.assert_close(boxed, losses.Identity(reference, network)(face), rtol=1e-12, atol=0)


def test_gradient_and_company() -> None:
    loss = losses.Identity(pictures(1, 64, seed=3), tiny_faces().double())
    images = pictures(3, 80)
    by_gradient, by_differences = slopes(loss, images, 1e-7)
    torch.testing.assert_close(by_gradient, by_differences, rtol=1e-5, atol=1e-9)
    alone = torch.cat([loss(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, loss(images), rtol=1e-10, atol=0)


def test_a_saved_network_is_the_module(tmp_path: Path) -> None:
    torch.jit.script(tiny_faces()).save(str(tmp_path / "face.pt"))
    reference, images = pictures(1, 112, torch.float32, seed=3), pictures(2, 112, torch.float32)
    saved = losses.Identity(reference, tmp_path / "face.pt")(images)
    torch.testing.assert_close(saved, losses.Identity(reference, tiny_faces())(images))


def test_a_plan_counts_a_module_and_says_that_it_cannot_count_torchscript(tmp_path: Path) -> None:
    from backdrift.pipelines.scored import count_loss
    from backdrift.planning.meta import weight_bytes

    meta = torch.empty(2, 3, 64, 64, device="meta")
    loss = losses.Identity(pictures(1, 112, seed=3), tiny_faces())
    found, notes = count_loss(loss, meta)
    assert notes == ()
    assert found is not None
    assert found.weights == weight_bytes(loss)
    assert found.profile.saved > 2 * 3 * 112 * 112 * 4
    torch.jit.script(tiny_faces()).save(str(tmp_path / "face.pt"))
    found, notes = count_loss(losses.Identity(pictures(1, 112, seed=3), tmp_path / "face.pt"), meta)
    assert found is None
    assert "could not be counted" in notes[0]


def test_an_onnx_file_is_the_module(tmp_path: Path) -> None:
    """Convolution, batch norm, PReLU and a linear layer written as ONNX, read back through onnx2torch."""
    pytest.importorskip("onnx2torch", reason="the extra 'faces' is not installed")
    onnx = pytest.importorskip("onnx")
    network = tiny_faces()
    conv, norm, prelu, _, linear = network.body
    values = {
        "cw": conv.weight, "cb": conv.bias, "ns": norm.weight, "nb": norm.bias, "nm": norm.running_mean,
        "nv": norm.running_var, "ps": prelu.weight[:, None, None], "lw": linear.weight, "lb": linear.bias,
    }  # fmt: skip
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["x", "cw", "cb"], ["a"], kernel_shape=[7, 7], strides=[7, 7]),
            node("BatchNormalization", ["a", "ns", "nb", "nm", "nv"], ["b"]),
            node("PRelu", ["b", "ps"], ["c"]),
            node("Flatten", ["c"], ["d"]),
            node("Gemm", ["d", "lw", "lb"], ["y"], transB=1),
        ],
        "faces",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 112, 112])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 8])],
        [onnx.numpy_helper.from_array(t.detach().numpy(), name) for name, t in values.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    onnx.save(model, tmp_path / "faces.onnx")
    reference, images = pictures(1, 112, torch.float32, seed=3), pictures(2, 112, torch.float32)
    images.requires_grad_()
    read = losses.Identity(reference, tmp_path / "faces.onnx")
    torch.testing.assert_close(
        read(images), losses.Identity(reference, network)(images), rtol=1e-4, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(read(images).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    reference = pictures(1, 112)
    (tmp_path / "faces.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx2torch", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"needs onnx2torch: pip install 'backdrift\[faces\]'"):
        losses.Identity(reference, tmp_path / "faces.onnx")
    (tmp_path / "faces.pt").write_text("nothing")
    with pytest.raises(InputError, match="neither an ONNX file"):
        losses.Identity(reference, tmp_path / "faces.pt")
    with pytest.raises(InputError, match="does not exist"):
        losses.Identity(reference, tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="needs a face network"):
        losses.resolve("identity:face.png")
    with pytest.raises(InputError, match="is in training mode"):
        losses.Identity(reference, tiny_faces().train())
    with pytest.raises(InputError, match="box must be"):
        losses.Identity(reference, tiny_faces(), box=(0.5, 0, 0.2, 1))
    with pytest.raises(InputError, match=r"must return embeddings \(1, D\), got \(1, 3, 112, 112\)"):
        losses.Identity(reference, nn.Identity())
