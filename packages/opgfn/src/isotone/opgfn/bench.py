"""Speed beside the peers that a user would pick instead, on the same work, checked to give the same answer first.

HyperGrid(4, 16), trajectory balance, batch 256: end-to-end steps a second beside torchgfn. Fragments, batch 64:
trajectories a second beside an object per state with the same network (recursionpharma/gflownet is not on PyPI).
Hypervolume beside pymoo.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import FragmentEnv, HyperGrid
from isotone.opgfn.experiments.per_state import sample_per_state
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.losses import tb_loss
from isotone.opgfn.policies import GraphPolicy, MLPPolicy
from isotone.opgfn.rollout import Trajectories, sample_forward
from isotone.opgfn.scoring import evaluate
from isotone.opgfn.volume import hypervolume
from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

NETWORKS = ((64, 64, 64), (256, 256))
"""The paper's network on grids (section 2.5), and torchgfn's own default."""
STILL = 1e-12
"""A learning rate: every step does all of its work, and both sides go on sampling trajectories of the same lengths."""


def bench(run: Run, small: bool = False) -> Report:
    """Every comparison whose peer is installed. Raises `InputError` where none is."""
    start, where = time.perf_counter(), device.resolve(run.device)
    work: list[tuple[str, Callable[[bool], list[Ratio]], str]] = [
        ("HyperGrid", _hypergrid, "gfn"),
        ("fragments", _fragments, "torch"),
        ("hypervolume", _hypervolumes, "pymoo"),
    ]
    ratios: list[Ratio] = []
    with progress.bar("opgfn bench", len(work), run.silent) as bar:
        for name, function, needed in work:
            bar.advance(0, work=name)
            if importlib.util.find_spec(needed) is not None:
                ratios += function(small)
            bar.advance(1)
    if not ratios:
        raise InputError("expected a peer to compare with, found none: install torchgfn or pymoo")
    scale: Any = "gpu" if where == "cuda" else "cpu"
    seconds = time.perf_counter() - start
    return Report("opgfn", "bench", scale, seeds=(), framework="torch", ratios=ratios, seconds=seconds)


def _timed(
    ours: Callable[[], Any], peer: Callable[[], Any], small: bool, calls: float, warmup: int, rounds: int
) -> tuple[float, float]:
    """What each does a second, `calls` a call: medians of interleaved runs."""
    timing = compare(ours, peer, rounds=6 if small else rounds, warmup=2 if small else warmup)
    return calls / timing.ours_seconds, calls / timing.peer_seconds


def _hypergrid(small: bool) -> list[Ratio]:
    dim, side, batch = (2, 6, 8) if small else (4, 16, 256)
    env = HyperGrid(dim, side)
    ratios = []
    for hidden in NETWORKS:
        peer = TorchGFN(dim, side, batch, hidden)
        torch.manual_seed(0)
        config = TrainConfig(objective="tb", lr=STILL, lr_log_z=STILL, batch_size=batch, epsilon=0.0)
        gfn = GFlowNet(env, MLPPolicy(env, hidden), config=config, table=False)
        check_torchgfn(env, peer)

        def ours(gfn: GFlowNet = gfn) -> None:
            gfn.fit(steps=gfn.step + 1)

        values = _timed(ours, peer.step, small, 1.0, 20, 12)
        network = f"{len(hidden)} x {hidden[0]}"
        work = f"HyperGrid({dim}, {side}), trajectory balance, batch {batch}, network {network}"
        ratios.append(
            Ratio(
                *(f"hypergrid-steps-{hidden[0]}", work, "opgfn", "torchgfn", version("torchgfn"), *values),
                unit="steps a second",
                target=5.0,
                higher_is_better=True,
            )
        )
    return ratios


class TorchGFN:
    """torchgfn's trajectory balance on its own HyperGrid, with a network of the same size (release 2.4)."""

    def __init__(self, dim: int, side: int, batch: int, hidden: Sequence[int]) -> None:
        from gfn.estimators import DiscretePolicyEstimator
        from gfn.gflownet import TBGFlowNet
        from gfn.gym import HyperGrid as Grid
        from gfn.preprocessors import KHotPreprocessor
        from gfn.samplers import Sampler
        from gfn.utils.modules import MLP, UniformModule

        torch.manual_seed(0)
        self.batch = batch
        self.env = Grid(ndim=dim, height=side, validate_modes=False)
        inputs, actions = KHotPreprocessor(height=side, ndim=dim), self.env.n_actions
        self.net = MLP(inputs.output_dim, actions, hidden_dim=hidden[0], n_hidden_layers=len(hidden))
        forward = DiscretePolicyEstimator(self.net, actions, preprocessor=inputs)
        backward = DiscretePolicyEstimator(UniformModule(actions - 1), actions, preprocessor=inputs, is_backward=True)
        self.gfn = TBGFlowNet(pf=forward, pb=backward)
        self.sampler = Sampler(estimator=forward)
        self.optimizer = torch.optim.Adam(
            [{"params": self.net.parameters(), "lr": STILL}, {"params": [self.gfn.logZ], "lr": STILL}]
        )

    def sample(self) -> Any:
        """A batch of trajectories, with their log-probabilities, on policy."""
        return self.sampler.sample_trajectories(self.env, n=self.batch, save_logprobs=True)

    def step(self) -> None:
        """Sample, loss, gradient step."""
        trajectories = self.sample()
        self.optimizer.zero_grad()
        # on policy: the log-probabilities of sampling, which have their graph, are not computed again
        self.gfn.loss(self.env, trajectories, recalculate_all_logprobs=False).backward()
        self.optimizer.step()


def check_torchgfn(env: HyperGrid, peer: TorchGFN) -> None:
    """Raise `ValueError` unless both give the same loss on the same trajectories of a uniform policy."""
    saved = {name: tensor.clone() for name, tensor in peer.net.state_dict().items()}
    with torch.no_grad():
        for parameter in peer.net.parameters():
            parameter.zero_()
    theirs = peer.sample()
    loss = float(peer.gfn.loss(peer.env, theirs).detach())
    peer.net.load_state_dict(saved)
    lengths = theirs.terminating_idx
    steps = int(lengths.max())
    states = theirs.states.tensor[:steps].transpose(0, 1).clamp(min=0)
    actions = theirs.actions.tensor[:steps, :, 0].transpose(0, 1).clamp(min=0, max=env.stop)
    batch = Trajectories(states, actions, actions, lengths)
    uniform = MLPPolicy(env, (8,), head_scale=0.0)
    with torch.no_grad():
        uniform.heads.bias.zero_()
    scores = evaluate(env, uniform, batch).scores()
    reward = env.objective(batch.terminals())[:, 0].log()
    ours = float(tb_loss(scores, torch.zeros(()), reward).detach())
    if abs(ours - loss) > 1e-3 * max(1.0, abs(loss)):
        raise ValueError(f"expected torchgfn's loss on its trajectories, {loss}, got {ours}")


def _fragments(small: bool) -> list[Ratio]:
    batch, fragments = (4, 3) if small else (64, 9)
    env = FragmentEnv(max_fragments=fragments)
    torch.manual_seed(0)
    policy = GraphPolicy(env, *((16, 1) if small else (64, 2)))
    generator, source = torch.Generator().manual_seed(0), random.Random(0)
    check_per_state(env, policy)

    def ours() -> None:
        sample_forward(env, lambda states, _: policy(states).logits, batch, generator=generator)

    def peer() -> None:
        sample_per_state(env, policy, batch, source)

    values = _timed(ours, peer, small, float(batch), 4, 8)
    return [
        Ratio(
            "fragment-trajectories",
            f"fragments, batch {batch}, at most {fragments}, the same network",
            "opgfn",
            "an object per state (recursionpharma/gflownet is not on PyPI)",
            "built in",
            *values,
            unit="trajectories a second",
            target=10.0,
            higher_is_better=True,
        )
    ]


def check_per_state(env: FragmentEnv, policy: GraphPolicy) -> None:
    """Raise `ValueError` unless both have the same rows and legal actions along per-state trajectories."""
    source = random.Random(1)
    states = sample_per_state(env, policy, 16, source)
    rows = torch.tensor([state.row(env) for state in states])
    mask = env.forward_mask(rows)
    for state, legal in zip(states, mask, strict=True):
        if sorted(state.legal(env)) != legal.nonzero().squeeze(1).tolist():
            raise ValueError(f"expected the same legal actions, got others in {state.row(env)}")


def _hypervolumes(small: bool) -> list[Ratio]:
    from pymoo.indicators.hv import HV

    ratios = []
    generator = np.random.default_rng(0)
    for d, n in ((2, 1000), (3, 1000), (4, 100)):
        n = 20 if small else n
        points = np.abs(generator.normal(size=(n, d)))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        peer = HV(ref_point=np.zeros(d))
        if abs(hypervolume(points) - float(peer(-points))) > 1e-9:
            raise ValueError(f"expected pymoo's hypervolume, {float(peer(-points))}, got {hypervolume(points)}")

        def ours(points: np.ndarray = points) -> None:
            hypervolume(points)

        def theirs(points: np.ndarray = points, peer: Any = peer) -> None:
            peer(-points)

        timing = compare(ours, theirs, rounds=6 if small else 20, warmup=2 if small else 5)
        ratios.append(
            Ratio(
                *(f"hypervolume-{d}", f"hypervolume of {n} points on a sphere, {d} objectives", "opgfn", "pymoo"),
                *(version("pymoo"), timing.ours_seconds, timing.peer_seconds),
                unit="s",
                target=1 / 1.5 if d == 3 else None,
            )
        )
    return ratios
