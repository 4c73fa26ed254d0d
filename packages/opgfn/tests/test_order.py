"""The order-preserving losses and the balance conditions (section 7, invariants 1 to 4, 7 and 9)."""

from __future__ import annotations

import math
import warnings

import pytest
import reference
import torch

from isotone.opgfn import losses
from isotone.opgfn.losses import FLSubTB, TrajectoryScores
from isotone.opgfn.order import LABELS, order_preserving_loss, pair_targets, pareto_label

F64 = torch.float64


def batch(n: int = 12, d: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(n, dtype=F64, generator=generator)
    u = torch.randint(1, 6, (n, d), generator=generator).double() / 5
    return r, u


def loss_of(mode: str, r: torch.Tensor, u: torch.Tensor, seed: int = 3) -> torch.Tensor:
    more = {"reference": u[:4] * 1.1} if mode in ("buffer", "rank") else {}
    return order_preserving_loss(r, u, mode=mode, generator=torch.Generator().manual_seed(seed), **more)


@pytest.mark.parametrize("mode", LABELS)
@pytest.mark.parametrize("d", [1, 3])
def test_increasing_maps_change_no_bit(mode: str, d: int) -> None:
    r, u = batch(d=d)
    maps = [u, u**3, torch.exp(5 * u) - 40]
    ranked = torch.stack([torch.unique(column, return_inverse=True)[1] for column in u.T], 1).double()
    if mode in ("buffer", "rank"):

        def one(v: torch.Tensor) -> torch.Tensor:
            return order_preserving_loss(r[4:], v[4:], mode=mode, reference=v[:4])
    else:

        def one(v: torch.Tensor) -> torch.Tensor:
            return loss_of(mode, r, v)

    values = {one(v).item() for v in [*maps, ranked]}
    assert len(values) == 1
    assert one(u).item() != one(1 - u).item(), "the loss says nothing of the order"


@pytest.mark.parametrize("mode", [mode for mode in LABELS if mode != "bce"])
def test_shift_invariance_and_no_gradient_for_log_z(mode: str) -> None:
    r, u = batch()
    r.requires_grad_()
    log_z = torch.zeros((), dtype=F64, requires_grad=True)
    loss = loss_of(mode, r + log_z, u)
    loss.backward()
    assert abs(log_z.grad.item()) < 1e-15 and abs(r.grad.sum().item()) < 1e-15
    assert r.grad.abs().max() > 1e-3
    assert loss_of(mode, r.detach() + 7.25, u).item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize("values", [(2.0, 1.0), (1.0, 2.0), (1.5, 1.5)])
def test_a_batch_of_two_is_a_pair(values: tuple[float, float]) -> None:
    r, u = torch.tensor([0.3, -0.4], dtype=F64), torch.tensor(values, dtype=F64)
    pair = order_preserving_loss(r, u, mode="pairwise", pairs=torch.tensor([[0], [1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = order_preserving_loss(r, u, mode="pareto")
    assert pair.item() == pytest.approx(whole.item(), abs=1e-14)
    assert pair.item() == pytest.approx(reference.pair_loss(0.3, -0.4, *values), abs=1e-14)
    assert order_preserving_loss(r, u, mode="all-pairs").item() == pytest.approx(pair.item(), abs=1e-14)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_batch_form_against_the_definition(d: int) -> None:
    r, u = batch(d=d, seed=5)
    flags = reference.non_dominated(u.tolist())
    assert pareto_label(u).tolist() == flags
    expected = reference.softmax_cross_entropy(r.tolist(), [float(q) for q in flags])
    assert order_preserving_loss(r, u, mode="pareto").item() == pytest.approx(expected, abs=1e-12)
    r.requires_grad_()
    order_preserving_loss(r, u, mode="pareto").backward()
    q = torch.tensor(flags).double()
    assert torch.allclose(r.grad, torch.softmax(r.detach(), 0) - q / q.sum(), atol=1e-14)


def test_all_pairs_is_the_mean_over_pairs() -> None:
    r, u = batch(d=1)
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    expected = sum(reference.pair_loss(r[i].item(), r[j].item(), u[i].item(), u[j].item()) for i, j in pairs)
    assert order_preserving_loss(r, u, mode="all-pairs").item() == pytest.approx(expected / len(pairs), abs=1e-12)
    every = torch.tensor(pairs).T
    assert order_preserving_loss(r, u, pairs=every).item() == pytest.approx(expected / len(pairs), abs=1e-12)


def test_comparisons_alone_say_the_same_as_values() -> None:
    r, u = batch()
    better = torch.tensor([[reference.dominates(a, b) for b in u.tolist()] for a in u.tolist()])
    for mode in ("pairwise", "all-pairs", "pareto", "bce"):
        generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        with_u = order_preserving_loss(r, u, mode=mode, generator=generator)
        without = order_preserving_loss(r, better=better, mode=mode, generator=twin)
        assert with_u.item() == without.item()
    circle = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    assert pareto_label(None, circle).all(), "preferences in a circle say nothing"


def test_invalid_objects_lose_to_every_valid_one() -> None:
    r, u = batch(6)
    valid = torch.tensor([True, True, False, True, False, True])
    flags = pareto_label(u, valid=valid)
    assert not flags[~valid].any() and flags.any()
    assert pareto_label(u, valid=torch.zeros(6, dtype=torch.bool)).all()
    pairs = torch.tensor([[0, 2, 2], [2, 0, 4]])
    assert pair_targets(u, None, pairs, valid).tolist()[:2] == [1.0, 0.0]
    better = torch.tensor([[reference.dominates(a, b) for b in u.tolist()] for a in u.tolist()])
    assert pair_targets(None, better, pairs, valid).tolist()[:2] == [1.0, 0.0]


def test_labels_against_a_buffer() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 0.2]], dtype=F64)
    r = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    above = torch.tensor([[2.0, 0.5]], dtype=F64)
    loss = order_preserving_loss(r, u, mode="buffer", reference=above)
    assert loss.item() == pytest.approx(reference.softmax_cross_entropy(r.tolist(), [0, 1, 0]))
    everything = torch.tensor([[2.0, 2.0]], dtype=F64)
    fallback = order_preserving_loss(r, u, mode="buffer", reference=everything)
    assert fallback.item() == order_preserving_loss(r, u, mode="pareto").item()
    ranks = reference.nd_rank([*u.tolist(), *above.tolist()])[:3]
    weights = [math.exp(-k) for k in ranks]
    ranked = order_preserving_loss(r, u, mode="rank", reference=above)
    assert ranked.item() == pytest.approx(reference.softmax_cross_entropy(r.tolist(), weights))


@pytest.mark.parametrize("mode", LABELS)
def test_gradients_of_order_losses(mode: str) -> None:
    r, u = batch(8)
    r.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(mode, x, u), (r,))


def test_geometric_progression() -> None:
    """Invariant 9: the chain of adjacent pairs over log R in [-log gamma, 0] has equal gaps at its optimum."""
    n, log_gamma = 5, math.log(20.0)
    free = torch.zeros(n, dtype=F64, requires_grad=True)
    pairs, u = torch.stack([torch.arange(1, n), torch.arange(n - 1)]), torch.arange(n, dtype=F64)
    optimizer = torch.optim.LBFGS([free], lr=0.5, max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def log_r() -> torch.Tensor:
        return -log_gamma * torch.sigmoid(free)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = order_preserving_loss(log_r(), u, pairs=pairs)
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    gaps = log_r().detach().diff()
    assert torch.allclose(gaps, torch.full_like(gaps, log_gamma / (n - 1)), atol=1e-3), gaps


def test_refusals_name_value_and_expectation() -> None:
    r, u = batch(4)
    bad = u.clone()
    bad[2, 1] = float("nan")
    circle = torch.eye(4).bool()
    cases = [
        (lambda: order_preserving_loss(r[:1], u[:1]), "at least 2"),
        (lambda: order_preserving_loss(r, bad), "nan for object 2, objective 1"),
        (lambda: order_preserving_loss(r, u / 0), "expected finite"),
        (lambda: order_preserving_loss(r[:3], u), "each of 4 objects"),
        (lambda: order_preserving_loss(r, u, mode="best"), "'best'"),
        (lambda: order_preserving_loss(r), "got none"),
        (lambda: order_preserving_loss(r, u, better=circle), "got both"),
        (lambda: order_preserving_loss(r, better=circle & ~torch.eye(4, dtype=bool), mode="rank"), "comparisons"),
        (lambda: order_preserving_loss(r, better=circle), "> and not >="),
        (lambda: order_preserving_loss(r, u, pairs=torch.tensor([[0], [9]])), "0 to 3"),
        (lambda: order_preserving_loss(r, u, pairs=torch.tensor([0, 1])), "(2, pairs)"),
        (lambda: order_preserving_loss(r, u.to("meta")), "one device"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)
    with pytest.warns(UserWarning, match="tied"):
        order_preserving_loss(r, torch.ones(4, 2), mode="pareto")


# --- balance conditions -------------------------------------------------------------------------------------


def scores(seed: int = 0, leaves: bool = False, lengths: tuple[int, ...] = (4, 2, 5, 1)) -> TrajectoryScores:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    log_pf, log_pb, flow = (torch.randn(shape, dtype=F64, generator=generator) for _ in range(3))
    n = torch.tensor(lengths)
    log_pb[torch.arange(len(n)), n - 1] = 0.0
    if leaves:
        for leaf in (log_pf, log_pb, flow):
            leaf.requires_grad_()
    return TrajectoryScores(log_pf, log_pb, n, flow)


def rows(s: TrajectoryScores) -> list[tuple[list[float], list[float], list[float]]]:
    return [
        (s.log_pf[i, :n].tolist(), s.log_pb[i, :n].tolist(), s.log_flow[i, :n].tolist())
        for i, n in enumerate(s.lengths.tolist())
    ]


LOG_R = torch.tensor([0.5, -1.0, 0.2, 2.0], dtype=F64)
U = torch.tensor([[1.0], [2.0], [3.0], [2.0]], dtype=F64)


def all_pairs(r: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    return order_preserving_loss(r, U[members], mode="all-pairs")


@pytest.mark.parametrize("lam", [0.5, 0.9, 1.0])
def test_subtb_is_the_triple_loop(lam: float) -> None:
    s = scores()
    expected = [reference.subtb(*row, LOG_R[i].item(), lam) for i, row in enumerate(rows(s))]
    assert losses.subtb_loss(s, LOG_R, lam).item() == pytest.approx(sum(expected) / 4, abs=1e-12)


def test_op_subtb_is_the_triple_loop() -> None:
    s = scores()

    def order(predicted: list[float], members: list[int]) -> float:
        pairs = [(i, j) for i in range(len(predicted)) for j in range(i + 1, len(predicted))]
        found = [reference.pair_loss(predicted[i], predicted[j], U[members[i]], U[members[j]]) for i, j in pairs]
        return sum(found) / len(found) if found else 0.0

    expected = reference.op_subtb(rows(s), order, 0.3, 0.9)
    assert losses.op_subtb_loss(s, all_pairs, 0.3, 0.9).item() == pytest.approx(expected, abs=1e-12)


def test_only_the_full_subtrajectory_is_trajectory_balance() -> None:
    """A trajectory of one action has one subtrajectory: SubTB is then TB, with F(s_0) = Z."""
    s = scores(lengths=(1, 1, 1, 1))
    tb = losses.tb_loss(TrajectoryScores(s.log_pf, s.log_pb, s.lengths), s.log_flow[:, 0], LOG_R)
    assert losses.subtb_loss(s, LOG_R, 1.0).item() == pytest.approx(tb.item(), abs=1e-12)
    # and of a longer one, the residual from s_0 to the sink is the trajectory-balance residual
    long = scores()
    tb_residual = losses.log_reward_tb(long, long.log_flow[:, 0]) - LOG_R
    start, total = losses._potential(long, long.flows())
    assert torch.allclose(start[:, 0] - (LOG_R - total), tb_residual, atol=1e-12)


def test_detailed_balance_edge_by_edge() -> None:
    s = scores()
    squares, between, terminal = [], [], []
    for i, (log_pf, log_pb, flow) in enumerate(rows(s)):
        for t in range(len(log_pf) - 1):
            between.append((flow[t] + log_pf[t] - log_pb[t] - flow[t + 1]) ** 2)
        terminal.append(flow[-1] + log_pf[-1])
        squares.append((terminal[-1] - LOG_R[i].item()) ** 2)
    expected = (sum(between) + sum(squares)) / (len(between) + len(squares))
    assert losses.db_loss(s, LOG_R).item() == pytest.approx(expected, abs=1e-12)
    order = all_pairs(torch.tensor(terminal, dtype=F64), torch.arange(4)).item()
    assert losses.op_db_loss(s, all_pairs, 0.1).item() == pytest.approx(sum(between) / len(between) + 0.1 * order)


@pytest.mark.parametrize("name", ["tb", "op-tb", "db", "op-db", "subtb", "op-subtb", "fm", "op-fm", "fl", "kl"])
def test_gradients_of_balance_losses(name: str) -> None:
    s = scores(leaves=True)
    log_z = torch.tensor(0.3, dtype=F64, requires_grad=True)
    states = torch.randn(6, dtype=F64, requires_grad=True)
    u = torch.rand(4, 5, 2, dtype=F64)

    def value(log_pf, log_pb, flow, z, x):
        now = TrajectoryScores(log_pf, log_pb, s.lengths, flow)
        return {
            "tb": lambda: losses.tb_loss(now, z, LOG_R),
            "op-tb": lambda: losses.op_tb_loss(now, z, all_pairs),
            "db": lambda: losses.db_loss(now, LOG_R),
            "op-db": lambda: losses.op_db_loss(now, all_pairs),
            "subtb": lambda: losses.subtb_loss(now, LOG_R),
            "op-subtb": lambda: losses.op_subtb_loss(now, all_pairs),
            "fm": lambda: losses.fm_loss(x, 2 * x**2, flow[:, 0], LOG_R),
            "op-fm": lambda: losses.op_fm_loss(x, 2 * x**2, flow[:, 0], all_pairs),
            "fl": lambda: FLSubTB(label="pareto")(now, flow.sin(), u, all_pairs),
            "kl": lambda: losses.backward_kl(torch.log_softmax(x.reshape(2, 3), 1), torch.ones(2, 3).bool()),
        }[name]()

    assert torch.autograd.gradcheck(value, (s.log_pf, s.log_pb, s.log_flow, log_z, states))


def test_forward_looking_with_nothing_to_look_at_is_subtb() -> None:
    s = scores()
    zero = torch.zeros_like(s.log_flow)
    u = torch.zeros(4, 5, 1, dtype=F64)
    fl = FLSubTB(lam=0.9, lambda_op=0.1)(s, zero, u, all_pairs, known=torch.zeros(4, 5).bool())
    assert fl.item() == pytest.approx(losses.op_subtb_loss(s, all_pairs, 0.1, 0.9).item(), abs=1e-12)


def test_forward_looking_head_learns_the_order_of_partial_objects() -> None:
    """log R-inter fitted by the differences alone must rise where u rises."""
    lengths = torch.full((16,), 4)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(16, 4, 1, dtype=F64, generator=generator).cumsum(1)
    head = torch.zeros(16, 4, dtype=F64, requires_grad=True)
    zero = torch.zeros(16, 4, dtype=F64)
    rest = torch.zeros(16, 4, dtype=F64, requires_grad=True)  # log F~, free to make up for what log R-inter takes
    s = TrajectoryScores(zero, zero, lengths, rest)
    optimizer = torch.optim.Adam([head, rest], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = FLSubTB(lambda_op=1.0)(s, head, u, lambda r, m: r.new_zeros(()), generator=generator)
        loss.backward()
        optimizer.step()
    rise, gain = (head[:, 1:] - head[:, :-1]).detach().flatten(), (u[:, 1:] - u[:, :-1]).flatten()
    concordant = ((rise[:, None] > rise) == (gain[:, None] > gain)).double().mean()
    assert concordant > 0.9


def test_backward_kl_is_zero_for_uniform_only() -> None:
    legal = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    uniform = torch.where(legal, -legal.sum(1, keepdim=True).double().clamp(min=1).log(), -torch.inf)
    assert losses.backward_kl(uniform, legal).item() == pytest.approx(0.0, abs=1e-12)
    tilted = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double().log()
    expected = (-0.5 * (math.log(0.9) + math.log(0.1)) - math.log(2)) / 2
    assert losses.backward_kl(tilted, legal).item() == pytest.approx(expected)
    assert losses.backward_kl(uniform[2:], legal[2:]).item() == 0.0


def test_losses_refuse_what_they_cannot_use() -> None:
    s = scores()
    with pytest.raises(ValueError, match="alike"):
        TrajectoryScores(s.log_pf, s.log_pb[:, :2], s.lengths)
    with pytest.raises(ValueError, match="state flows"):
        losses.db_loss(TrajectoryScores(s.log_pf, s.log_pb, s.lengths), LOG_R)
    with pytest.raises(ValueError, match="got 1.5"):
        losses.subtb_loss(s, LOG_R, 1.5)
    with pytest.raises(ValueError, match="same states"):
        losses.fm_loss(LOG_R, LOG_R[:2], LOG_R, LOG_R)


def test_log_rewards_of_nan_are_refused() -> None:
    log_r = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="nan for object 1"):
        order_preserving_loss(log_r, torch.arange(3.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid": torch.ones(2, dtype=torch.bool)}, "valid"),
        ({"reference": torch.ones(4, 3), "mode": "buffer"}, "reference"),
        ({"tie_tol": -1.0}, "tie_tol"),
        ({"tie_tol": 0.1, "mode": "pareto"}, "tie_tol"),
    ],
)
def test_arguments_that_do_not_fit(options: dict, words: str) -> None:
    u = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match=words):
        order_preserving_loss(torch.zeros(3), u, **options)
