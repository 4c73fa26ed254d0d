"""The student (section 2.3): an MLP that needs one vertex's row of features and no hypergraph.

Dimensions: B rows, d features, C classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.lighthgnn.features import Features, as_features
from isotone.lighthgnn.outputs import fit_temperature, probabilities
from isotone.lighthgnn.sparse import SparseLinear, SparseMatrix
from isotone.shared.errors import InputError


class _Dropout(nn.Dropout):
    """Dropout that on a CPU draws 16 random bits an entry, four entries a draw of the generator.

    torch's own draws a 64-bit number an entry, which takes longer than the rest of a small student's step. The
    probability is p within 2^-16, and the scale is that of the probability drawn, so that means are unbiased.
    """

    def forward(self, X: Tensor) -> Tensor:
        if not self.training or self.p == 0 or X.device.type != "cpu":
            return super().forward(X)
        drawn = torch.empty((X.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        dropped = round(self.p * 2**16)
        kept = drawn.view(torch.int16)[: X.numel()].view(X.shape) >= dropped - 2**15
        return X * kept * (2**16 / (2**16 - dropped))


class LightMLP(nn.Module):
    """Linear -> ReLU -> batch norm -> dropout, `layers` - 1 times, then Linear: activation before batch norm.

    Defaults are the authors': hidden width 128, two layers, dropout 0.5. `temperature` divides the logits in
    `predict_proba` and in exports (1 unless `calibrate` was called); it never changes a prediction. `multilabel`: the
    C outputs are labels that a row may have any number of, each a sigmoid of its own (`outputs.py`).
    """

    temperature: Tensor

    def __init__(
        self,
        in_channels: int,
        hidden: int = 128,
        num_classes: int = 2,
        *,
        layers: int = 2,
        dropout: float = 0.5,
        batch_norm: bool = True,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1 or min(in_channels, hidden, num_classes) < 1:
            raise InputError(f"expected sizes of at least 1, got {(in_channels, hidden, num_classes)}, {layers} layers")
        if not 0 <= dropout < 1:
            raise InputError(f"expected dropout from 0 to below 1, got {dropout}")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "hidden": hidden,
            "num_classes": num_classes,
            "layers": layers,
            "dropout": dropout,
            "batch_norm": batch_norm,
            "multilabel": multilabel,
        }
        widths = [in_channels, *[hidden] * (layers - 1)]
        self.linears = nn.ModuleList(SparseLinear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) if batch_norm else nn.Identity() for b in widths[1:])
        self.drop = _Dropout(dropout)
        self.out = SparseLinear(widths[-1], num_classes)
        self.register_buffer("temperature", torch.ones(()))

    def embed(self, X: Features) -> Features:
        """The last hidden layer (B x hidden), the features themselves where there is none."""
        if X.shape[1] != self.config["in_channels"]:
            raise InputError(f"expected {self.config['in_channels']} features, the student's own, got {X.shape[1]}")
        hidden: Any = X
        for linear, norm in zip(self.linears, self.norms, strict=True):
            hidden = self.drop(norm(linear(hidden).relu()))
        return hidden

    def forward(self, X: Features) -> Float[Tensor, "B C"]:
        """Logits, before the temperature. Raises `InputError` on another number of features."""
        return self.out(self.embed(X))

    @torch.inference_mode()
    def predict_proba(self, X: Any) -> Float[Tensor, "B C"]:
        """Probabilities of rows in any form that `as_features` takes; `InputError` where they are not finite."""
        training = self.training
        self.eval()
        logits = self(_on(as_features(X), self.out.weight.device))
        self.train(training)
        return probabilities(logits / self.temperature, self.config["multilabel"])

    def predict(self, X: Any) -> Int[Tensor, " B *C"]:
        """The most probable class of each row (B); zeros and ones (B x C) where `multilabel`."""
        found = self.predict_proba(X)
        return (found > 0.5).long() if self.config["multilabel"] else found.argmax(1)

    @torch.no_grad()
    def fold_batchnorm(self) -> LightMLP:
        """The same function in eval mode as linear maps and ReLUs alone; this student is left as it is.

        BN(r) = s r + t stands after the ReLU, so it goes into the linear map that follows: W' = W diag(s),
        b' = b + W t.
        """
        folded = LightMLP(**{**self.config, "batch_norm": False, "dropout": 0.0}).to(self.out.weight.device)
        maps: list[Any] = [*self.linears, self.out]
        norms: list[Any] = [*self.norms, None]
        scale: Any = None
        shift: Any = None
        for source, target, norm in zip(maps, [*folded.linears, folded.out], norms, strict=True):
            weight, bias = source.weight, source.bias
            if scale is not None:
                bias = bias + weight @ shift
                weight = weight * scale
            target.weight.copy_(weight)
            target.bias.copy_(bias)
            scale = shift = None
            if norm is not None and not isinstance(norm, nn.Identity):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                shift = norm.bias - norm.running_mean * scale
        folded.temperature.copy_(self.temperature)
        return folded.eval()

    def export_onnx(self, path: str | os.PathLike[str], int8: bool = False) -> Path:
        """Write this student as ONNX: `export.export_onnx`."""
        from isotone.lighthgnn.export import export_onnx

        return export_onnx(self, path, int8)

    @torch.no_grad()
    def calibrate(self, X: Features, y: Int[Tensor, " B *C"]) -> float:
        """Set `temperature` to the one that fits these rows best (`outputs.fit_temperature`), and return it."""
        training = self.training
        self.eval()
        self.temperature.fill_(fit_temperature(self(X), y))
        self.train(training)
        return float(self.temperature)


def _on(X: Features, device: torch.device) -> Features:
    return X if X.device == device else X.to(device)


class CompiledStudent:
    """A folded student for the lowest latency: on a CPU plain products into buffers, on a GPU one CUDA graph a size.

    `student`: any `LightMLP`. A call takes B x d dense rows and returns logits that the next call of the same size
    overwrites. The hypergraph it was distilled from is nowhere in it.
    """

    def __init__(self, student: LightMLP) -> None:
        folded = student.fold_batchnorm()
        self._maps = [
            (linear.weight.detach().t().contiguous(), linear.bias.detach()) for linear in [*folded.linears, folded.out]
        ]
        self._buffers: list[Tensor] = []
        self._graphs: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def _run(self, X: Tensor) -> Tensor:
        if not self._buffers or len(self._buffers[0]) != len(X) or self._buffers[0].device != X.device:
            with torch.inference_mode(False):  # buffers made within that mode could not be written to outside it
                self._buffers = [X.new_empty(len(X), bias.shape[0]) for _, bias in self._maps]
        return self._through(X, self._maps, self._buffers)

    @staticmethod
    def _through(X: Tensor, maps: list[tuple[Tensor, Tensor]], buffers: list[Tensor]) -> Tensor:
        # neither side requires a gradient: a mode switch a call would take longer than a product
        for (weight, bias), buffer in zip(maps[:-1], buffers[:-1], strict=True):
            X = torch.addmm(bias, X, weight, out=buffer).relu_()
        weight, bias = maps[-1]
        return torch.addmm(bias, X, weight, out=buffers[-1])

    def __call__(self, X: Float[Tensor, "B d"] | SparseMatrix) -> Float[Tensor, "B C"]:
        """Logits. Raises `InputError` on another number of features."""
        if X.shape[1] != self._maps[0][0].shape[0]:
            raise InputError(f"expected {self._maps[0][0].shape[0]} features, the student's own, got {X.shape[1]}")
        if isinstance(X, SparseMatrix):
            weight, bias = self._maps[0]
            hidden = X @ weight + bias
            for weight, bias in self._maps[1:]:
                hidden = torch.addmm(bias, hidden.relu_(), weight)
            return hidden
        X = X.detach() if X.requires_grad else X
        if X.device.type == "cuda":  # pragma: no cover - needs a GPU
            return self._replay(X)
        return self._run(X)

    def _replay(self, X: Tensor) -> Tensor:  # pragma: no cover - needs a GPU
        if X.shape[0] not in self._graphs:
            held = X.clone()
            buffers = [X.new_empty(len(X), bias.shape[0]) for _, bias in self._maps]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._through(held, self._maps, buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self._through(held, self._maps, buffers)
            self._graphs[X.shape[0]] = graph, held, result
        graph, held, result = self._graphs[X.shape[0]]
        held.copy_(X)
        graph.replay()
        return result
