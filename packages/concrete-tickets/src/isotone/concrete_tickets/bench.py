"""Speed: a search step beside a training step of the same batch, and beside what one would use in PyTorch.

The peers are an eager PyTorch loop of the same search (masks from logits, the forward at masked weights, autograd,
`torch.optim.Adam`) and, for plain magnitude masks, `torch.nn.utils.prune`. Before timing, both sides must give the same
objective and gradient at the same noise, and the same mask.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.concrete_tickets.arms import Experiment, quiet_collapse
from isotone.concrete_tickets.baselines import magnitude
from isotone.concrete_tickets.concrete import TAU, relaxed_mask
from isotone.concrete_tickets.images import load_images
from isotone.concrete_tickets.layout import Layout, masked, named_weights
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.objectives import Batch, Network, reverse_kl
from isotone.concrete_tickets.search import SearchConfig, search
from isotone.concrete_tickets.training import Recipe, train
from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run

EPOCHS, ROUNDS, DENSITY = 12, 15, 0.0074
STEP = 1 / 1.5
"""A search step may take 1.5 times a training step."""


def bench(run: Run, rounds: int = ROUNDS) -> Report:
    """Time whole scans of 12 epochs on the digits, divided by their steps; rows with PyTorch where it is installed."""
    begin = time.perf_counter()
    where = device.resolve(run.device, "jax")
    images = load_images("digits")
    plan = _plan(images, rounds, where)
    with progress.bar("concrete-tickets bench", len(plan), run.silent) as bar, quiet_collapse():
        ratios = []
        for row in plan:
            ratios.append(row())
            bar.advance(1)
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


def _plan(images: Any, rounds: int, where: str) -> list[Callable[[], Ratio]]:
    """The rows, as functions that time them."""
    mlp, lenet = (_experiment(name, images) for name in ("mlp", "lenet"))
    step = functools.partial(step_row, rounds=rounds, where=where)
    plan: list[Callable[[], Ratio]] = [
        functools.partial(step, mlp, "kl", "none"),
        functools.partial(step, mlp, "kl", "examples"),
        functools.partial(step, mlp, "loss", "none"),
        functools.partial(step, lenet, "kl", "none"),
        functools.partial(step, lenet, "kl", "batches"),
    ]
    try:
        import torch  # noqa: F401
    except ImportError:
        return plan
    peers: list[Callable[[], Ratio]] = [
        functools.partial(torch_row, mlp, rounds, where),
        functools.partial(magnitude_row, rounds, where),
    ]
    return plan + peers


def _experiment(name: str, images: Any) -> Experiment:
    model = make_model(name, images.shape, images.classes)
    return Experiment(images, model, Recipe(epochs=EPOCHS), 0, SearchConfig(epochs=EPOCHS))


def _steps(experiment: Experiment) -> int:
    return EPOCHS * (len(experiment.images.train[1]) // experiment.recipe.batch_size)


def _searcher(experiment: Experiment, params: Any, objective: str, **settings: Any) -> Callable[[], Any]:
    return functools.partial(
        search,
        *(experiment.model.apply, params, experiment.data, DENSITY, objective),
        config=experiment.config,
        where=experiment.model.where,
        **settings,
    )


def step_row(experiment: Experiment, objective: str, cache: str, rounds: int, where: str) -> Ratio:
    """A search step beside a training step."""
    params, name = experiment.model.init(jax.random.key(0)), experiment.model.name
    trainer = functools.partial(train, experiment.trainer, params, experiment.data)
    searcher = _searcher(experiment, params, objective, cache_dense=cache)
    timing = compare(searcher, trainer, rounds=rounds, warmup=2, device=where)
    ours = timing.ours_seconds / _steps(experiment)
    cached = "" if cache == "none" else f", dense logits cached by {cache}"
    return Ratio(
        f"{name}-{objective}-train" + ("" if cache == "none" else "-cached"),
        f"{name} on digits, a step of 128",
        f"search step ({objective}{cached})",
        *("jitted training step", f"jax {jax.__version__}"),
        ours,
        ours * timing.ratio,
        "s",
        STEP,
    )


def torch_row(experiment: Experiment, rounds: int, where: str) -> Ratio:
    """The search of an MLP beside the PyTorch loop."""
    import torch

    params = experiment.model.init(jax.random.key(0))
    check_equal_to_torch(experiment, params)
    peer = TorchSearch(experiment, params, "cuda" if where == "cuda" else "cpu")
    steps = _steps(experiment)
    timing = compare(
        *(_searcher(experiment, params, "kl"), lambda: peer.run(steps)), rounds=rounds, warmup=2, device=where
    )
    ours = timing.ours_seconds / steps
    return Ratio(
        "mlp-torch",
        "mlp on digits, a search step of 128 (kl)",
        "one compiled loop",
        *("eager PyTorch loop", str(torch.__version__)),
        ours,
        ours * timing.ratio,
        "s",
        3.0,
    )


def magnitude_row(rounds: int, where: str) -> Ratio:
    """A global magnitude mask of ResNet-20's weights beside `torch.nn.utils.prune`."""
    import torch
    from torch.nn.utils import prune

    model = make_model("resnet20", (32, 32, 3), 10)
    params = model.init(jax.random.key(0))
    weights = named_weights(params, model.where)
    place = "cuda" if where == "cuda" else "cpu"
    values = [torch.nn.Parameter(_tensor(torch, w, place)) for w in weights.values()]

    def theirs() -> Any:
        holders = [torch.nn.Module() for _ in values]
        for holder, value in zip(holders, values, strict=True):
            holder.register_parameter("weight", value)
        pairs = [(holder, "weight") for holder in holders]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=total - kept)
        return [holder.weight_mask for holder in holders]

    ours = functools.partial(magnitude, params, DENSITY, model.where)
    ticket = ours()
    total, kept = ticket.total, ticket.kept
    for mask, other in zip(ticket.masks.values(), theirs(), strict=True):
        if not np.array_equal(np.asarray(mask), other.cpu().numpy() > 0):
            raise RuntimeError("expected the mask of torch.nn.utils.prune, got another")
    timing = compare(lambda: ours().masks, theirs, rounds=rounds, warmup=2, device=where)
    return Ratio(
        "magnitude-torch",
        "ResNet-20, a global magnitude mask",
        "magnitude",
        *("torch.nn.utils.prune.global_unstructured", str(torch.__version__)),
        timing.ours_seconds,
        timing.ours_seconds * timing.ratio,
        "s",
        1.0,
    )


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

    def run(self, steps: int, density: float = DENSITY) -> Any:
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
