"""The estimator's identities on quadratics and smooth functions, and MeZO beside the algorithm as it reads."""

from __future__ import annotations

import math

import models
import pytest
import reference
import torch
from torch import nn

from isotone.distzo2 import MeZO, normal, parameter_groups, rng
from isotone.distzo2.baselines import ReferenceMeZO
from isotone.distzo2.kernels import fill
from isotone.distzo2.layout import Segment
from isotone.distzo2.rng import PhiloxNoise
from isotone.shared.errors import InputError

D = 7


def quadratic(seed=0):
    torch.manual_seed(seed)
    root = torch.randn(D, D, dtype=torch.float64)
    theta = nn.Parameter(torch.randn(D, dtype=torch.float64))
    return root @ root.T, theta


@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0])
def test_quadratic_oracle(eps):
    """g = z^T A theta for any eps: odd terms cancel (section 7, item 1)."""
    matrix, theta = quadratic()
    start = theta.detach().clone()
    optimizer = MeZO([theta], lr=0.0, eps=eps)
    optimizer.step(lambda: 0.5 * theta @ matrix @ theta)
    z = normal(rng.step_seed(0, 0), 0, 0, D).double()
    assert optimizer.last_grads[0] == pytest.approx(float(z @ matrix @ start), rel=1e-10 / min(1.0, 100 * eps))
    assert torch.equal(theta.detach(), start)


def test_smooth_functions_are_off_by_eps_squared():
    theta = nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))

    def loss():
        return (theta.exp() + theta**4).sum()

    (gradient,) = torch.autograd.grad(loss(), theta)
    z = normal(rng.step_seed(0, 0), 0, 0, D).double()
    errors = []
    for eps in (0.1, 0.05, 0.025):
        optimizer = MeZO([theta], lr=0.0, eps=eps)
        optimizer.step(loss)
        errors.append(abs(optimizer.last_grads[0] - float(z @ gradient)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def test_estimates_are_unbiased_and_of_the_known_variance():
    """Section 7, items 7 and 8, at 20,000 exact projected gradients: 1,000 seeds, 20 places of each."""
    matrix, theta = quadratic(1)
    gradient = matrix @ theta.detach()
    n = 20_000
    places = Segment(0, 0, 0, 20 * D, True)
    drawn = [fill(places, seed, PhiloxNoise(), theta.device, theta.dtype) for seed in range(n // 20)]
    z = torch.cat(drawn).view(n, D)
    estimates = (z @ gradient)[:, None] * z
    variance = gradient.square().sum() + gradient.square()
    # 4 standard errors, 7 coordinates: false alarm 4e-4 for other seeds
    assert bool(((estimates.mean(0) - gradient).abs() < 4 * (variance / n).sqrt()).all())
    assert bool(((estimates.var(0) / variance - 1).abs() < 0.15).all())
    squared = estimates.square().sum(1).mean() / gradient.square().sum()
    assert float(squared) == pytest.approx(D + 2, rel=0.1)


def pieces(model):
    parameters = list(model.parameters())

    def direction(step):
        seed = rng.step_seed(0, step)
        return [normal(seed, i, 0, p.numel()).view(p.shape).to(p.dtype) for i, p in enumerate(parameters)]

    return direction


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_algorithm_as_it_reads(weight_decay):
    """Scheduled rates, decay by role, and the numbers of `parameter_groups`."""
    ours, naive = models.chain(), models.chain()
    rates = [0.01 * 0.5**t for t in range(6)]
    batches = [models.points(seed=t) for t in range(6)]
    optimizer = MeZO(parameter_groups(ours, weight_decay), lr=rates[0], eps=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    grads = []
    for batch in batches:
        optimizer.step(lambda batch=batch: models.squared_error(ours, batch)[0])
        grads.append(optimizer.last_grads[0])
        scheduler.step()
    decays = [p.ndim == 2 for p in naive.parameters()]
    direction = pieces(naive)
    losses = [lambda model, batch=batch: models.squared_error(model, batch)[0] for batch in batches]
    options = {"eps": 1e-3, "decays": decays, "weight_decay": weight_decay}
    wanted = reference.mezo(naive, losses, [direction(t) for t in range(6)], rates, **options)
    assert grads == pytest.approx(wanted, rel=1e-9)
    # fp32 coefficients would show here
    torch.testing.assert_close(models.flat(ours), models.flat(naive), rtol=1e-12, atol=1e-12)


def test_torch_mode_is_the_reference_implementation():
    """Same g_t and weights as the in-place order of passes, up to the drift that this has (fp64)."""
    ours, theirs = models.chain(), models.chain()
    optimizer = MeZO(ours.parameters(), lr=0.01, rng="torch")
    peer = ReferenceMeZO(theirs.named_parameters(), lr=0.01)
    batch = models.points()
    grads = []
    for step in range(8):
        optimizer.step(lambda: models.squared_error(ours, batch)[0])
        grads.append(optimizer.last_grads[0])
        peer.step(lambda: models.squared_error(theirs, batch)[0], rng.step_seed(0, step))
    assert grads == pytest.approx(peer.grads, rel=1e-8)
    torch.testing.assert_close(models.flat(ours), models.flat(theirs), rtol=1e-10, atol=1e-12)


def test_rate_zero_leaves_the_weights_as_they_are():
    """Bitwise; the in-place sequence drifts (section 7, item 9)."""
    ours, theirs = (models.chain(dtype=torch.float32) for _ in range(2))
    start, batch = models.flat(ours), models.points(dtype=torch.float32)
    optimizer = MeZO(ours.parameters(), lr=0.0)
    peer = ReferenceMeZO(theirs.named_parameters(), lr=0.0)
    for step in range(20):
        optimizer.step(lambda: models.squared_error(ours, batch)[0])
        peer.step(lambda: models.squared_error(theirs, batch)[0], step)
    assert torch.equal(models.flat(ours), start) and not torch.equal(models.flat(theirs), start)


def test_directions_are_averaged_and_one_side_needs_one_loss_more():
    matrix, theta = quadratic()
    start = theta.detach().clone()
    calls = []

    def loss():
        calls.append(None)
        return 0.5 * theta @ matrix @ theta

    optimizer = MeZO([theta], lr=0.1, n_directions=3)
    optimizer.step(loss)
    z = torch.stack([normal(rng.step_seed(0, 0, k), 0, 0, D).double() for k in range(3)])
    wanted = start - 0.1 * ((z @ matrix @ start)[:, None] * z).mean(0)
    torch.testing.assert_close(theta.detach(), wanted, rtol=1e-6, atol=1e-6)
    assert len(calls) == 6
    calls.clear()
    one = MeZO([theta], lr=0.0, n_directions=3, estimator="one_sided", eps=1e-6)
    one.step(loss)
    assert len(calls) == 4
    assert one.last_grads == pytest.approx((z @ matrix @ theta.detach()).tolist(), rel=1e-3)


def test_a_loss_that_is_not_finite_changes_nothing():
    matrix, theta = quadratic()
    start = theta.detach().clone()
    optimizer = MeZO([theta], lr=0.1)
    assert math.isnan(optimizer.step(lambda: theta.sum() * math.nan))
    assert torch.equal(theta.detach(), start) and optimizer.skipped == 1
    optimizer.step(lambda: 0.5 * theta @ matrix @ theta)
    assert not torch.equal(theta.detach(), start)


def test_state_goes_on_with_the_same_seeds_and_errors_restore_the_weights():
    matrix, theta = quadratic()
    optimizer = MeZO([theta], lr=0.01)
    for _ in range(3):
        optimizer.step(lambda: 0.5 * theta @ matrix @ theta)
    other = nn.Parameter(theta.detach().clone())
    resumed = MeZO([other], lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: 0.5 * theta @ matrix @ theta)
    resumed.step(lambda: 0.5 * other @ matrix @ other)
    assert torch.equal(theta, other)

    def fails():
        raise KeyError("closure")

    before = theta.detach().clone()
    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert torch.equal(theta.detach(), before)


def test_parameters_that_are_not_contiguous():
    base = torch.randn(4, 6, dtype=torch.float64)
    turned = nn.Parameter(base.T)
    plain = nn.Parameter(base.T.contiguous())
    target = torch.randn(6, 4, dtype=torch.float64)
    for parameter in (turned, plain):
        optimizer = MeZO([parameter], lr=0.05)
        for _ in range(3):
            optimizer.step(lambda parameter=parameter: ((parameter - target) ** 2).sum())
    assert torch.equal(turned, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"n_directions": 0}, "n_directions"),
        ({"estimator": "three"}, "estimator"),
        ({"rng": "dice"}, "rng"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=f"expected {words}"):
        MeZO([nn.Parameter(torch.zeros(2))], **options)


def test_refused_parameters():
    with pytest.raises(InputError, match="requires_grad"):
        MeZO([nn.Parameter(torch.zeros(2), requires_grad=False)])
    with pytest.raises(InputError, match="meta"):
        MeZO([nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(InputError, match="closure"):
        MeZO([nn.Parameter(torch.zeros(2))]).step()
    with pytest.raises(InputError, match="numbered once"):
        MeZO([{"params": [nn.Parameter(torch.zeros(2))], "numbers": [3]}])
