"""Speed: a search step beside a training step of the same batch, and beside an eager PyTorch loop of the same search.

The peer is the search as one writes it in PyTorch: masks from logits, `torch.func.functional_call` at the masked
weights, autograd, `torch.optim.Adam`. Before timing, both take the same noise and must give the same objective and the
same gradient.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.concrete_tickets.arms import Experiment
from isotone.concrete_tickets.concrete import TAU, relaxed_mask
from isotone.concrete_tickets.images import load_images
from isotone.concrete_tickets.layout import Layout, masked
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.objectives import Batch, Network, reverse_kl
from isotone.concrete_tickets.search import SearchConfig, search
from isotone.concrete_tickets.training import Recipe, train
from isotone.shared import device
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run

EPOCHS, ROUNDS = 4, 12


def bench(run: Run, rounds: int = ROUNDS) -> Report:
    """Time whole scans of 4 epochs on the digits, divided by their steps."""
    begin = time.perf_counter()
    where = device.resolve(run.device, "jax")
    images = load_images("digits")
    ratios: list[Ratio] = []
    for name in ("mlp", "lenet"):
        ratios += _step_rows(name, images, rounds, where)
    ratios += _cached_row(images, rounds, where)
    ratios += _torch_row(images, rounds, where)
    return Report(
        "concrete-tickets",
        "bench",
        "gpu" if where == "cuda" else "cpu",
        (),
        "jax",
        ratios=ratios,
        data=[{"name": "digits", "sha256": images.sha256}],
        seconds=time.perf_counter() - begin,
    )


def _experiment(name: str, images: Any) -> Experiment:
    model = make_model(name, images.shape, images.classes)
    return Experiment(images, model, Recipe(epochs=EPOCHS), 0, SearchConfig(epochs=EPOCHS))


def _searcher(experiment: Experiment, params: Any, objective: str, **settings: Any) -> Callable[[], Any]:
    return functools.partial(
        search,
        *(experiment.model.apply, params, experiment.data, 0.0074, objective),
        config=experiment.config,
        where=experiment.model.where,
        **settings,
    )


def _step_rows(name: str, images: Any, rounds: int, where: str) -> list[Ratio]:
    """The search step may take 1.5 times the training step: ratio 0.667 or more."""
    experiment = _experiment(name, images)
    params = experiment.model.init(jax.random.key(0))
    steps = EPOCHS * (len(images.train[1]) // experiment.recipe.batch_size)
    trainer = functools.partial(train, experiment.trainer, params, experiment.data)
    found = []
    for objective, target in (("kl", 1 / 1.5), ("loss", 1 / 1.5)):
        timing = compare(_searcher(experiment, params, objective), trainer, rounds=rounds, warmup=2, device=where)
        ours = timing.ours_seconds / steps
        work = f"{name} on digits, a step of 128"
        peer = "jitted training step", f"jax {jax.__version__}"
        found.append(
            Ratio(
                f"{name}-{objective}-train",
                work,
                f"search step ({objective})",
                *peer,
                ours,
                ours * timing.ratio,
                "s",
                target,
            )
        )
    return found


def _cached_row(images: Any, rounds: int, where: str) -> list[Ratio]:
    experiment = _experiment("lenet", images)
    params = experiment.model.init(jax.random.key(0))
    cached = _searcher(experiment, params, "kl", cache_dense=True)
    timing = compare(cached, _searcher(experiment, params, "kl"), rounds=rounds, warmup=2, device=where)
    steps = EPOCHS * (len(images.train[1]) // experiment.recipe.batch_size)
    ours = timing.ours_seconds / steps
    peer = "search step (kl)", "this package"
    work = "lenet on digits, a step of 128"
    ratio = Ratio("lenet-cached", work, "the same, cache_dense", *peer, ours, ours * timing.ratio, "s", None)
    return [ratio]


def _torch_row(images: Any, rounds: int, where: str) -> list[Ratio]:
    try:
        import torch
    except ImportError:
        return []
    experiment = _experiment("mlp", images)
    params = experiment.model.init(jax.random.key(0))
    check_equal_to_torch(experiment, params)
    steps = EPOCHS * (len(images.train[1]) // experiment.recipe.batch_size)
    peer = TorchSearch(experiment, params, "cuda" if where == "cuda" else "cpu")
    ours = _searcher(experiment, params, "kl")
    timing = compare(ours, lambda: peer.run(steps), rounds=rounds, warmup=2, device=where)
    seconds = timing.ours_seconds / steps
    row = Ratio(
        "mlp-torch",
        "mlp on digits, a search step of 128 (kl)",
        "one scan",
        "eager PyTorch loop",
        str(torch.__version__),
        seconds,
        seconds * timing.ratio,
        "s",
        3.0,
    )
    return [row]


class TorchSearch:
    """The same search as an eager PyTorch loop over an MLP."""

    def __init__(self, experiment: Experiment, params: Any, where: str) -> None:
        import torch

        self.torch, self.experiment, self.where = torch, experiment, where
        layers = params["layers"]
        self.weights = [_tensor(torch, layers[i]["kernel"], where) for i in range(len(layers))]
        self.biases = [_tensor(torch, layers[i]["bias"], where) for i in range(len(layers))]
        self.inputs, self.labels = (_tensor(torch, part, where) for part in experiment.data)
        self.inputs = self.inputs.reshape(len(self.inputs), -1)
        self.total = sum(w.numel() for w in self.weights)

    def forward(self, weights: Any, x: Any) -> Any:
        for i, (weight, bias) in enumerate(zip(weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = self.torch.relu(x) if i < len(weights) - 1 else x
        return x

    def objective(self, logits: Any, noise: Any, x: Any) -> Any:
        torch = self.torch
        mask = torch.sigmoid(logits + noise / TAU)
        parts = torch.split(mask, [w.numel() for w in self.weights])
        sparse = [w * m.view_as(w) for w, m in zip(self.weights, parts, strict=True)]
        log_q = torch.log_softmax(self.forward(sparse, x), -1)
        with torch.no_grad():
            log_p = torch.log_softmax(self.forward(self.weights, x), -1)
        return 100 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    def run(self, steps: int, density: float = 0.0074) -> Any:
        """`steps` steps from the start; the logits."""
        torch = self.torch
        start = float(np.log(density / (1 - density)))
        logits = torch.full((self.total,), start, device=self.where, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1, eps=1e-15)
        multiplier, desired = None, 1.1 * density * self.total
        batch = self.experiment.recipe.batch_size
        order, place = None, len(self.inputs)
        for _ in range(steps):
            if place + batch > len(self.inputs):
                order, place = torch.randperm(len(self.inputs), device=self.where), 0
            index = order[place : place + batch]  # type: ignore[index]
            place += batch
            uniform = torch.rand(self.total, device=self.where).clamp_(1e-7, 1 - 1e-7)
            noise = torch.log(uniform) - torch.log1p(-uniform)
            optimizer.zero_grad(set_to_none=True)
            self.objective(logits, noise, self.inputs[index]).backward()
            with torch.no_grad():
                p = torch.sigmoid(logits)
                error = p.sum() / desired - 1
                h = 100 / desired * p * (1 - p)
                target = torch.where(error > 0, logits.grad.norm() / (h.norm() + 1e-12), error.new_zeros(()))
                multiplier = target if multiplier is None else 0.99 * multiplier + 0.01 * target
                logits.grad.add_(multiplier * h)
            optimizer.step()
        return logits.detach()


def check_equal_to_torch(experiment: Experiment, params: Any) -> float:
    """Largest relative difference of objective and gradient from the peer's at the same noise; raises beyond 1e-3."""
    import torch

    peer = TorchSearch(experiment, params, "cpu")
    layout = Layout.of(params, experiment.model.where)
    rng = np.random.default_rng(0)
    logits, noise = rng.normal(size=layout.total).astype(np.float32), rng.logistic(size=layout.total)
    noise = noise.astype(np.float32)
    x, y = experiment.data[0][:128], experiment.data[1][:128]

    @jax.jit
    def value(a: Any) -> Any:
        nets = [
            Network(experiment.model.apply, p, layout.names)
            for p in (masked(params, layout.expand(relaxed_mask(a, jnp.asarray(noise)))), params)
        ]
        return 100 * reverse_kl(nets[0], nets[1], Batch(x, y), jax.random.key(0))

    ours, gradient = jax.value_and_grad(value)(jnp.asarray(logits))
    theirs: Any = torch.from_numpy(logits).requires_grad_()
    # the peer's layers are in the order of the network, ours in the order of the names
    found = peer.objective(theirs, torch.from_numpy(noise), peer.inputs[:128])
    found.backward()
    differences = [
        abs(float(ours) - found.item()) / abs(found.item()),
        float(np.linalg.norm(np.asarray(gradient) - theirs.grad.numpy()) / np.linalg.norm(theirs.grad.numpy())),
    ]
    if max(differences) > 1e-3:
        raise RuntimeError(f"expected the objective and gradient of the PyTorch loop, differ by {differences}")
    return max(differences)


def _tensor(torch: Any, array: Any, where: str) -> Any:
    return torch.from_numpy(np.array(array)).to(where)
