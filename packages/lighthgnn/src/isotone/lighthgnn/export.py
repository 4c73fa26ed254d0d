"""Students and teachers in files: safetensors with a config, ONNX, torch.export, int8. None holds a hypergraph.

An exported student answers a batch of rows (B x d, float32) with class probabilities (B x C).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.teachers import TEACHERS, Teacher, make_teacher
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

Made = TypeVar("Made", bound=nn.Module)
FORMATS = ("safetensors", "onnx", "onnx-int8", "torch-export")


def save_student(student: LightMLP, folder: str | os.PathLike[str]) -> Path:
    """Write student.safetensors and student.json (its sizes) into `folder`; returns the weights' path."""
    return _save(student, folder, "student", student.config)


def load_student(folder: str | os.PathLike[str]) -> LightMLP:
    """What `save_student` wrote, in eval mode; `InputError` where it is missing or broken."""
    config, weights = _load(folder, "student")
    student = _made(lambda: LightMLP(**config), "student", folder)
    _fill(student, weights, folder)
    return student


def save_teacher(teacher: Teacher, folder: str | os.PathLike[str], name: str, **config: Any) -> Path:
    """Write teacher.safetensors and teacher.json: its `name` in `TEACHERS` and the arguments it was made with."""
    return _save(teacher, folder, "teacher", {"name": name, **config})


def load_teacher(folder: str | os.PathLike[str]) -> Teacher:
    """What `save_teacher` wrote, in eval mode."""
    config, weights = _load(folder, "teacher")
    if config.get("name") not in TEACHERS:
        raise InputError(f"expected a teacher of {', '.join(TEACHERS)} in {os.fspath(folder)!r}")
    teacher = _made(lambda: make_teacher(**config), "teacher", folder)
    _fill(teacher, weights, folder)
    return teacher


class _Probabilities(nn.Module):
    """A folded student with its temperature, and softmax or sigmoids: what is exported."""

    def __init__(self, student: LightMLP) -> None:
        super().__init__()
        folded = student.fold_batchnorm().cpu()
        sources: list[Any] = [*folded.linears, folded.out]
        linears = [nn.Linear(source.in_features, source.out_features) for source in sources]
        for linear, source in zip(linears, sources, strict=True):
            linear.load_state_dict(source.state_dict())
        with torch.no_grad():
            linears[-1].weight.div_(folded.temperature)
            linears[-1].bias.div_(folded.temperature)
        self.hidden, self.out = nn.ModuleList(linears[:-1]), linears[-1]
        self.multilabel = bool(student.config["multilabel"])

    @property
    def maps(self) -> list[Any]:
        """The linear maps, first to last."""
        return [*self.hidden, self.out]

    def forward(self, X: Float[Tensor, "B d"]) -> Float[Tensor, "B C"]:
        for linear in self.hidden:
            X = linear(X).relu()
        logits = self.out(X)
        return logits.sigmoid() if self.multilabel else logits.softmax(1)


def export_torch(student: LightMLP, path: str | os.PathLike[str]) -> Path:
    """Write a .pt2 program of `torch.export`, any batch size; load with `torch.export.load(path).module()`."""
    path = Path(path)
    module = _Probabilities(student).eval()
    example = (torch.zeros(2, int(student.config["in_channels"])),)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, example, dynamic_shapes={"X": {0: batch}})
    torch.export.save(program, path)
    return path


def export_onnx(student: LightMLP, path: str | os.PathLike[str], int8: bool = False) -> Path:
    """Write ONNX: Gemm and Relu, then Softmax or Sigmoid; input "X" (batch x d), output "probabilities" (batch x C).

    `int8`: weights at 8 bits, one scale an output (symmetric), a quarter of the bytes; they are multiplied out to
    float32 when the model is loaded. Needs the extra `onnx`.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise InputError("expected the package onnx for this format: install isotone-lighthgnn[onnx]") from None
    maps = _Probabilities(student).maps
    nodes, constants, current = [], [], "X"
    for number, linear in enumerate(maps):
        weight, bias = f"weight{number}", f"bias{number}"
        matrix = linear.weight.detach()
        if int8:
            codes, scale = quantize_rows(matrix)
            constants.append(numpy_helper.from_array(codes.numpy(), f"{weight}_int8"))
            constants.append(numpy_helper.from_array(scale.numpy(), f"{weight}_scale"))
            names = [f"{weight}_int8", f"{weight}_scale"]
            nodes.append(helper.make_node("DequantizeLinear", names, [weight], axis=0))
        else:
            constants.append(numpy_helper.from_array(matrix.numpy(), weight))
        constants.append(numpy_helper.from_array(linear.bias.detach().numpy(), bias))
        last = number == len(maps) - 1
        output = "logits" if last else f"hidden{number}"
        nodes.append(helper.make_node("Gemm", [current, weight, bias], [output], transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [output], [f"active{number}"]))
            output = f"active{number}"
        current = output
    if student.config["multilabel"]:
        nodes.append(helper.make_node("Sigmoid", [current], ["probabilities"]))
    else:
        nodes.append(helper.make_node("Softmax", [current], ["probabilities"], axis=1))
    sizes = int(student.config["in_channels"]), int(student.config["num_classes"])
    graph = helper.make_graph(
        nodes,
        "lighthgnn",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", sizes[0]])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", sizes[1]])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="isotone-lighthgnn")
    model.ir_version = 9  # what opset 17's runtimes read
    onnx.checker.check_model(model)
    path = Path(path)
    atomic_write(path, model.SerializeToString())
    return path


@torch.no_grad()
def with_int8_weights(student: LightMLP) -> LightMLP:
    """The folded student with its weights rounded as `export_onnx(int8=True)` rounds them: what that file answers."""
    rounded = student.fold_batchnorm()
    linears: list[Any] = [*rounded.linears, rounded.out]
    for linear in linears:
        codes, scale = quantize_rows(linear.weight)
        linear.weight.copy_(codes * scale.unsqueeze(1))
    return rounded


def quantize_rows(matrix: Float[Tensor, "m n"]) -> tuple[Tensor, Float[Tensor, " m"]]:
    """int8 codes and one scale a row, symmetric: matrix ~ codes * scale within half a scale."""
    scale = (matrix.abs().amax(1) / 127).clamp(min=1e-12)
    return (matrix / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def _save(model: nn.Module, folder: str | os.PathLike[str], stem: str, config: dict[str, Any]) -> Path:
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = folder / f"{stem}.safetensors"
    atomic_write(path, save(tensors))
    atomic_write(folder / f"{stem}.json", json.dumps(config, indent=1).encode())
    return path


def _load(folder: str | os.PathLike[str], stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    for name in (f"{stem}.json", f"{stem}.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"expected {name} in {str(folder)!r}, found none")
    try:
        config = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        weights = load((folder / f"{stem}.safetensors").read_bytes())
    except (ValueError, SafetensorError) as error:
        raise InputError(f"expected a whole {stem} in {str(folder)!r}: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"expected an object in {stem}.json of {str(folder)!r}, got {type(config).__name__}")
    return config, weights


def _made(make: Callable[[], Made], stem: str, folder: str | os.PathLike[str]) -> Made:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise InputError(f"expected the sizes of a {stem} in {stem}.json of {os.fspath(folder)!r}: {error}") from None


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise InputError(f"expected weights that fit the config in {os.fspath(folder)!r}: {first}") from None
    model.eval()
