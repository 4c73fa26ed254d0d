"""The training loss of a batch: which balance condition, against which reward or order (section 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isotone.opgfn import distributed, losses
from isotone.opgfn.conditional import Goal, LogZ, Preference
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.order import order_preserving_loss, random_pairs
from isotone.opgfn.policies.base import Policy
from isotone.opgfn.scoring import Evaluation, edge_flows


@dataclass(frozen=True)
class Target:
    """What is known of a batch's objects: their objectives `u`, or who is `better` than whom; who is `valid`.

    `reference`: objectives of the archive, for labels against it. `raw`, `condition`: the conditional baselines'
    preferences or goals, as they are and as the network sees them.
    """

    u: Float[Tensor, "B d"] | None
    valid: Bool[Tensor, " B"]
    better: Bool[Tensor, "B B"] | None = None
    reference: Float[Tensor, "m d"] | None = None
    raw: Float[Tensor, "B c"] | None = None
    condition: Float[Tensor, "B e"] | None = None
    conditioner: Preference | Goal | None = None
    partial: tuple[Float[Tensor, "B T d"], Bool[Tensor, "B T"]] | None = None
    """Objectives of the visited states, and which of them are objects that have some: for forward-looking losses."""


def label_mode(config: TrainConfig, target: Target) -> str:
    """The configured label, or the default: pairs for one objective, the batch's Pareto front for more."""
    if config.label is not None:
        return config.label
    return "pareto" if target.u is not None and target.u.shape[1] > 1 else "pairwise"


def order_of(
    config: TrainConfig, target: Target, generator: torch.Generator, shared: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    """L_OP of predicted log-rewards of some members of the batch, over all ranks' batches.

    `shared`: the generator that all ranks hold in the same state, for the pairs of the global batch.
    """
    mode = label_mode(config, target)

    def order(log_r: Tensor, members: Tensor) -> Tensor:
        u = None if target.u is None else target.u[members]
        valid = target.valid[members]
        better = None if target.better is None else target.better[members][:, members]
        source, reference = generator, target.reference
        if distributed.active():
            if u is None:
                raise ValueError("expected objective values on several ranks, got comparisons")
            log_r = distributed.gather_log_rewards(log_r)
            u, valid = distributed.gather_rows(u), distributed.gather_rows(valid)
            source = shared  # the archive is every rank's, since all ranks push the global batch
        pairs = random_pairs(len(log_r), source, log_r.device) if mode == "pairwise" else None
        return order_preserving_loss(
            *(log_r, u), mode=mode, better=better, pairs=pairs, reference=reference, valid=valid, generator=source
        )

    return order


def log_reward(config: TrainConfig, target: Target) -> Float[Tensor, " B"]:
    """log R of the baselines: beta log mean(u), or the conditioner's; -75 where the object is invalid."""
    if target.u is None:
        raise ValueError(f"expected objective values for {config.objective}, got comparisons: they train op-* only")
    if target.conditioner is not None:
        assert target.raw is not None
        reward = target.conditioner.log_reward(target.u, target.raw)
    else:
        reward = config.beta * target.u.mean(1).clamp(min=config.floor).log()
    return torch.where(target.valid, reward, config.invalid_log_reward)


def training_loss(
    config: TrainConfig,
    evaluation: Evaluation,
    target: Target,
    policy: Policy,
    log_z: LogZ,
    generator: torch.Generator,
    shared: torch.Generator,
    baseline: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss that `config.objective` names. `baseline`: REINFORCE's running mean reward."""
    if distributed.active() and config.kind == "op" and config.family not in ("tb", "db", "fm"):
        raise ValueError(
            f"expected a loss over whole batches (op-tb, op-db, op-fm) on several ranks, got {config.objective}"
        )
    log_pf = evaluation.log_pf()
    scores = evaluation.scores(log_pf, config.idempotent)
    family, weight = config.family, config.order_weight
    if config.kind == "op":
        order = order_of(config, target, generator, shared)
        if family == "tb":
            loss = weight * losses.op_tb_loss(scores, log_z().double(), order)
        elif family == "db":
            loss = losses.op_db_loss(scores, order, weight)
        elif family == "fm":
            loss = losses.op_fm_loss(*edge_flows(evaluation, policy), order, weight)
        elif family == "subtb":
            loss = losses.op_subtb_loss(scores, order, weight, config.lam)
        else:
            assert target.partial is not None
            u, known = target.partial
            longest = 1 if family == "fl-db" else None
            form = losses.FLSubTB(config.lam, weight, longest, label_mode(config, target))
            loss = form(scores, evaluation.log_inter(), u, order, known, generator)
    else:
        reward = log_reward(config, target)
        z = log_z(target.condition).double()
        if family == "tb":
            loss = losses.tb_loss(scores, z, reward)
        elif family == "db":
            loss = losses.db_loss(scores, reward)
        elif family == "subtb":
            loss = losses.subtb_loss(scores, reward, config.lam)
        elif family == "fm":
            loss = losses.fm_loss(*edge_flows(evaluation, policy, target.condition), reward)
        else:
            total = torch.where(scores.mask, scores.log_pf, 0.0).sum(1)
            gain = reward.exp() - baseline
            # the score-function gradient of the return, and of the entropy, whose own return is -log P_F
            loss = -(gain * total).mean() + config.entropy * (total.detach() * total).mean()
    if config.lambda_kl:
        if evaluation.output.backward_logits is None:
            raise ValueError("expected a policy with a learned P_B for lambda_kl, got a uniform one")
        visited = evaluation.position[evaluation.trajectories.mask]
        loss = loss + config.lambda_kl * losses.backward_kl(
            evaluation.log_pb()[visited], evaluation.backward_mask[visited]
        )
    return loss
