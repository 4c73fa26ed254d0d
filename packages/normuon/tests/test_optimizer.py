"""Section 7's invariants on one process, the engine against the naive loop, and every refusal."""

import copy
import math
import pickle
import warnings

import pytest
import reference
import torch
from torch.nn import Parameter

from isotone.normuon import (
    Muon,
    NorMuon,
    convert_lr,
    matrix_stats,
    row_normalize,
    split_params,
    update_stats,
    zeropower,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHAPES = [(6, 9), (9, 6), (9, 6), (5, 5)]
MODES = ["rms", "original", "spectral", "match_rms_adamw", None]


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def feed(params, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(optimizer, params, steps, factor=1.0):
    for step in range(steps):
        feed(params, step, factor)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("scale", MODES)
@pytest.mark.parametrize("kind", [NorMuon, Muon])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False}, {"cautious": True}, {"axis": "column"}, {"orthogonalize": "ns5"}, {"foreach": False}],
    ids=str,
)
def test_engine_equals_the_naive_loop(scale, kind, options):
    if kind is Muon and "axis" in options:
        pytest.skip("Muon has no statistics")
    params = parameters()
    expected = [p.detach().clone() for p in params]
    axis = options.get("axis", "row")
    moments = [torch.zeros_like(w) for w in expected]
    seconds = [None if kind is Muon else torch.zeros_like(w[:, :1] if axis == "row" else w[:1]) for w in expected]
    optimizer = kind(params, lr=0.01, scale=scale, **options)
    settings = {key: value for key, value in options.items() if key in ("nesterov", "cautious", "axis")}
    for step in range(6):
        feed(params, step)
        gradients = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True)), "p.grad is untouched"
        for i, gradient in enumerate(gradients):
            method = options.get("orthogonalize", "polar_express")
            expected[i], moments[i], seconds[i] = reference.step(
                expected[i], gradient, moments[i], seconds[i], lr=0.01, scale=scale, method=method, **settings
            )
    assert max((p - w).abs().max() for p, w in zip(params, expected, strict=True)) < 1e-9


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_muon_equals_torch_muon(adjust):
    """Invariant 6: fifty steps, the same Newton-Schulz in the same precision."""
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    scale = adjust.replace("spectral_unclamped", "spectral")
    mine = Muon(ours, lr=1e-3, scale=scale, orthogonalize="ns5", ns_dtype=torch.bfloat16)
    run(mine, ours, 50)
    run(torch.optim.Muon(theirs, lr=1e-3, adjust_lr_fn=adjust), theirs, 50)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_first_step_has_even_rows():
    """Invariant 1: v = 0, so every row of O^ has norm sqrt(n / (1 - beta2))."""
    orthogonal = torch.randn(7, 5, dtype=torch.float64)
    normalised = row_normalize(orthogonal, torch.zeros(7, 1, dtype=torch.float64), 0.95, 1e-30)
    assert torch.allclose(normalised.norm(dim=1), torch.full((7,), math.sqrt(5 / 0.05), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (8, 8), (1, 4)])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
def test_rms_of_the_step(shape, factor):
    """Invariant 2."""
    params = parameters([shape])
    before = params[0].detach().clone()
    run(NorMuon(params, lr=1e-3, weight_decay=0.0), params, 1, factor)
    assert abs((params[0] - before).square().mean().sqrt() / 2e-4 - 1) < 1e-6


def test_bias_correction_is_a_no_op():
    """Invariant 3: a factor common to all of v cancels in the rescaling."""
    plain, corrected = parameters(), parameters()
    one, two = (NorMuon(p, lr=1e-2, eps=1e-30) for p in (plain, corrected))
    run(one, plain, 1), run(two, corrected, 1)
    for p in corrected:
        two.state[p]["second_moment"] *= 7.0
    for optimizer, params in ((one, plain), (two, corrected)):
        for p in params:
            optimizer.state[p]["second_moment"] *= 1e6  # large: what the next step adds is 1e-6 of it
        feed(params, 9), optimizer.step()
    assert max((a - b).abs().max() for a, b in zip(plain, corrected, strict=True)) < 1e-6


def test_gradient_scale_and_permutations():
    """Invariant 4."""
    weights = torch.randn(6, 9, dtype=torch.float64)
    gradient = torch.randn(4, 6, 9, dtype=torch.float64)
    rows, columns, signs = torch.randperm(6), torch.randperm(9), torch.tensor([1.0, -1, 1, -1, -1, 1]).double()[:, None]
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]

    def end(change, method="ns5", weight_change=lambda w: w):
        p = Parameter(weight_change(weights.clone()))
        optimizer = NorMuon([p], lr=0.1, weight_decay=0.0, orthogonalize=method, eps=1e-12)
        for g in gradient:
            p.grad = change(g)
            optimizer.step()
        return p.detach() - weight_change(weights)

    plain = end(lambda g: g)
    assert torch.allclose(end(lambda g: 1e3 * g), plain, atol=1e-6)
    assert torch.allclose(end(lambda g: g[rows][:, columns]), plain[rows][:, columns], atol=1e-9)
    assert torch.allclose(end(lambda g: signs * g), signs * plain, atol=1e-9)
    exact = end(lambda g: g, "svd")
    assert torch.allclose(end(lambda g: g @ rotation, "svd"), exact @ rotation, atol=1e-9)
    left = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    tall = parameters([(9, 6)])[0]
    assert not torch.allclose(end(lambda g: left @ g, "ns5"), left @ plain, atol=1e-6), tall.shape


def test_exact_backend_on_wide_matrices_is_muon():
    """Invariant 5: orthonormal rows have constant norms."""
    ours, theirs = parameters([(4, 9), (5, 5)]), parameters([(4, 9), (5, 5)])
    settings = {"lr": 0.01, "scale": "original", "orthogonalize": "svd"}
    run(NorMuon(ours, **settings), ours, 8), run(Muon(theirs, **settings), theirs, 8)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-6


@pytest.mark.parametrize("method", ["ns5", "polar_express"])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_singular_values_follow_the_scalar_map(method, shape):
    """Invariant 7."""
    update = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    scaled = s / (s.norm() + (0 if method == "polar_express" else 1e-7))
    if method == "polar_express":
        scaled = s * 1.02 / (1.02 * s.norm() + 1e-6)
    mapped = reference.scalar_map(scaled, method)
    assert torch.allclose(zeropower(update, method), u @ mapped.diag() @ vh, atol=1e-10)
    assert torch.allclose(zeropower(update, "svd"), u @ vh, atol=1e-10)


def test_table_and_batches_and_callables():
    x = torch.randn(3, 2, 4, 6)
    for method in ("ns5", "ns5-table", "polar_express", "svd", lambda u: u / 2):
        whole = zeropower(x, method)
        assert whole.shape == x.shape
        assert torch.allclose(whole[1, 1], zeropower(x[1, 1], method), atol=1e-5)
    assert zeropower(torch.empty(0, 3)).shape == (0, 3)
    assert zeropower(x.bfloat16()).dtype == torch.bfloat16
    large = torch.randn(2, 520, 530)
    product = zeropower(large, "ns5")
    assert torch.allclose(product[1], zeropower(large[1], "ns5"), atol=1e-5)
    singular = torch.linalg.svdvals(zeropower(large[0], steps=9))
    assert 0.8 < singular.min() and singular.max() < 1.2


def test_dead_rows_and_zero_gradients():
    """Invariants 8 and 12; the 0/0 of a zero-initialised projection."""
    p = parameters([(6, 9)])[0]
    start = p.detach().clone()
    optimizer = NorMuon([p], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.allclose(p, start * 0.99**5, atol=1e-12)
    other = parameters([(6, 9)])[0]
    start = other.detach().clone()
    optimizer = NorMuon([other], lr=0.1, weight_decay=0.0)
    for step in range(3):
        feed([other], step)
        other.grad[2] = 0
        optimizer.step()
    assert torch.equal(other[2], start[2]) and other.isfinite().all() and not torch.equal(other[1], start[1])


def test_norm_identities():
    """Invariants 13 and 14: ||O^|| from the row means; match_norm keeps ||O||."""
    for scale in ("original", None):
        params = parameters([(9, 6)])
        optimizer = NorMuon(params, lr=1.0, weight_decay=0.0, scale=scale, orthogonalize="svd")
        for step in range(4):
            before = params[0].detach().clone()
            feed(params, step)
            optimizer.step()
            factor = math.sqrt(9 / 6) if scale else 1.0
            assert abs((params[0] - before).norm() / (factor * math.sqrt(6)) - 1) < 1e-6


@pytest.mark.parametrize("kind", [NorMuon, Muon])
def test_state_dict_is_bit_exact(kind):
    """Invariant 10, with low-precision parameters whose v stays float32."""
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype=dtype)
        optimizer = kind(params, lr=0.01)
        run(optimizer, params, 3)
        saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
        run(optimizer, params, 3)
        again = [Parameter(w) for w in weights]
        other = kind(again, lr=0.01)
        other.load_state_dict(saved)
        run(other, again, 3)
        assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
        if kind is NorMuon:
            assert other.state[again[0]]["second_moment"].dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_go_on(copied):
    params = parameters()
    optimizer = NorMuon(params, lr=0.01, orthogonalize="ns5")
    run(optimizer, params, 3)
    again = copied(optimizer)
    theirs = again.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(run(optimizer, params, 2), run(again, theirs, 2), strict=True))


def test_state_of_another_kind_or_set_of_gradients_is_taken_over():
    params, again = parameters(), parameters()
    plain = Muon(params, lr=0.01)
    run(plain, params, 2)
    NorMuon(again, lr=0.01).load_state_dict(copy.deepcopy(plain.state_dict()))
    loaded = NorMuon(again, lr=0.01)
    loaded.load_state_dict(copy.deepcopy(plain.state_dict()))
    run(loaded, again, 1)  # beta2 from our defaults, v from zero
    assert loaded.state[again[0]]["second_moment"].any()
    # which parameters have a gradient changes from step to step: each matrix goes its own way all the same
    one, many = parameters(), parameters()
    together, apart = NorMuon(many), [NorMuon([p]) for p in one]
    for step in range(6):
        feed(one, step), feed(many, step)
        for i in range(len(one)):
            if (step + i) % 3 == 0:
                one[i].grad = many[i].grad = None
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.allclose(a, b) for a, b in zip(one, many, strict=True))


def test_first_step_of_the_optimizer_has_even_rows():
    """Invariant 1 through the engine, and invariant 13: the norm from the row means is that of the step."""
    (weight,) = parameters([(9, 6)])
    before = weight.detach().clone()
    optimizer = NorMuon([weight], lr=1.0, weight_decay=0.0, eps=1e-30, scale=None)
    run(optimizer, [weight], 1)
    step = before - weight.detach()
    rows = step.norm(dim=1)
    assert torch.allclose(rows, rows.mean().expand(9))
    orthogonal = zeropower(reference_update(0, weight.shape))
    assert abs(step.norm() - orthogonal.norm()) < 1e-6
    assert torch.allclose(optimizer.state[weight]["second_moment"], 0.05 * orthogonal.square().mean(1, keepdim=True))


def reference_update(seed, shape):
    """The first Nesterov update of `feed`: (1 - beta²) G."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - 0.95**2) * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_schedulers():
    params = parameters()
    optimizer = NorMuon([{"params": params[:2]}, {"params": params[2:], "kind": "adamw"}])
    for scheduler in (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=5),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    ):
        run(optimizer, params, 1)
        scheduler.step()
    assert all(p.isfinite().all() for p in params)


def test_layouts_are_their_matrices():
    """Heads, fused parts, experts and convolutions equal the same matrices as parameters of their own."""

    def blocks(weight, sizes):
        return [Parameter(b.clone()) for b in weight.split(sizes)]

    for shape, options, sizes in (
        ((12, 5), {"num_heads": 3}, [4, 4, 4]),
        ((12, 5), {"split_sizes": (6, 4, 2)}, [6, 4, 2]),
        ((12, 5), {"split_sizes": (8, 4), "num_heads": (4, 2)}, [2] * 6),
        ((3, 4, 5), {}, [4, 4, 4]),
        ((6, 2, 3, 3), {}, [6]),
        ((6, 2, 3), {"experts": False}, [6]),
        ((5, 1, 4), {}, [1] * 5),
    ):
        for axis in ("row", "column"):
            whole = parameters([shape])[0]
            carrier = whole.detach().reshape(sum(sizes), -1)
            parts = blocks(carrier, sizes)
            one, many = NorMuon([{"params": [whole], "axis": axis, **options}]), NorMuon(parts, axis=axis)
            for step in range(4):
                feed([whole], step)
                for part, gradient in zip(parts, whole.grad.reshape(carrier.shape).split(sizes), strict=True):
                    part.grad = gradient
                one.step(), many.step()
            assert torch.allclose(whole.detach().reshape(carrier.shape), torch.cat([p.detach() for p in parts]))
            assert len(update_stats(one)) == len(sizes)


def test_channels_last_convolution_is_written_back():
    weight = torch.randn(4, 3, 3, 3)
    plain, last = Parameter(weight.clone()), Parameter(weight.clone().to(memory_format=torch.channels_last))
    for p in (plain, last):
        optimizer = NorMuon([p])
        feed([p], 0)
        optimizer.step()
    assert torch.allclose(plain, last, atol=1e-6) and not torch.equal(plain, weight)


def test_adamw_group_equals_torch():
    torch.manual_seed(0)
    ours = [Parameter(torch.randn(4)), Parameter(torch.randn(5, 3))]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-9, "weight_decay": 0.1}
    optimizer = NorMuon([{"params": ours, "kind": "adamw"}], adamw=settings)
    run(optimizer, ours, 5), run(torch.optim.AdamW(theirs, **settings), theirs, 5)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_split_params_by_module_type():
    net = torch.nn.Sequential(
        torch.nn.Embedding(9, 4), torch.nn.Conv2d(1, 2, 3), torch.nn.LayerNorm(4), torch.nn.Linear(4, 9, bias=False)
    )
    names = {g["kind"]: [n for n, _ in g["params"]] for g in split_params(net)}
    assert names == {"matrix": ["1.weight", "3.weight"], "adamw": ["0.weight", "1.bias", "2.weight", "2.bias"]}
    net[3].weight = net[0].weight
    assert "3.weight" not in [n for g in split_params(net) if g["kind"] == "matrix" for n, _ in g["params"]]
    audio = split_params(torch.nn.Sequential(torch.nn.Conv1d(3, 8, 5), torch.nn.Linear(4, 4)))
    assert {g.get("experts", True): [n for n, _ in g["params"]] for g in audio if g["kind"] == "matrix"} == {
        False: ["0.weight"],
        True: ["1.weight"],
    }
    head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    assert [n for n, _ in split_params(head, head=[head[1]])[0]["params"]] == ["0.weight"]


def test_missing_gradients_and_closures():
    params = parameters()
    optimizer = NorMuon(params)
    feed(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    NorMuon(parameters()).step()


def test_convert_lr_keeps_the_rms():
    """Section 2.10, and its worked number."""
    for shape in ((9, 6), (6, 9), (5, 5)):
        for old in MODES:
            for new in MODES:
                sizes = []
                for scale, lr in ((old, 0.01), (new, convert_lr(0.01, old, new, *shape))):
                    params = parameters([shape])
                    before = params[0].detach().clone()
                    settings = {"weight_decay": 0.0, "scale": scale, "orthogonalize": "svd"}
                    run(NorMuon(params, lr=lr, **settings), params, 1)
                    sizes.append((params[0] - before).square().mean().sqrt())
                assert abs(sizes[0] / sizes[1] - 1) < 1e-6
    assert abs(convert_lr(0.02, "original", "rms", 768, 768) - 0.0036) < 1e-4


def test_update_stats():
    params = parameters([(30, 6)])
    optimizer = NorMuon(params, lr=1e-3)
    assert update_stats(optimizer) == {}
    run(optimizer, params, 1)
    stats = update_stats(optimizer)["0"]
    # the statistics are of the momentum, whose own norm meets Polar Express's eps of 1e-6: even to that order
    assert stats["row_cv_after"] < 1e-4 < stats["row_cv"] and abs(stats["step_rms"] - 2e-4) < 1e-9
    assert 0.8 < stats["sigma_min"] <= stats["sigma_max"] < 1.2
    matrix = torch.diag(torch.tensor([3.0, 4.0]))
    assert matrix_stats(matrix)["sigma_max"] == 4 and abs(matrix_stats(matrix)["row_cv"] - 1 / 7) < 1e-9


@pytest.mark.slow
def test_compiled_equals_eager():
    plain, compiled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    run(NorMuon(plain), plain, 3), run(NorMuon(compiled, compile=True), compiled, 3)
    assert max((a - b).abs().max() for a, b in zip(plain, compiled, strict=True)) < 1e-5


REFUSED = [
    ({"lr": -1.0}, "lr"),
    ({"lr": float("nan")}, "nan"),
    ({"momentum": 1.0}, "1.0"),
    ({"beta2": -0.1}, "-0.1"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"eps": 0.0}, "eps"),
    ({"scale": "huge"}, "huge"),
    ({"axis": "diagonal"}, "diagonal"),
    ({"orthogonalize": "magic"}, "magic"),
    ({"ns_steps": 0}, "ns_steps"),
    ({"ns_steps": 100}, "100"),
    ({"strategy": "hope"}, "hope"),
    ({"adamw": {"beta": 1}}, "beta"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda x: str(x))
def test_refusals_of_settings(options, words):
    with pytest.raises(ValueError, match=words):
        NorMuon(parameters(), **options)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((5,), {}, "2 dimensions"),
        ((6, 4), {"split_sizes": (3, 2)}, "sum to 6"),
        ((6, 4), {"num_heads": 4}, "num_heads"),
        ((2, 6, 4), {"num_heads": 2}, "rows"),
        ((2, 3, 3, 3), {"flatten_conv": False}, "flatten_conv"),
        ((6, 4), {"kind": "sgd"}, "sgd"),
        ((6, 4), {"orthogonalize": "svd"}, "orthogonalize"),
        ((6, 4), {"num_heads": 0}, "num_heads"),
        ((6, 4), {"split_sizes": ()}, "split_sizes"),
        ((0, 4), {}, "entries"),
        ((6, 4), {"ns_steps": 2.5}, "ns_steps"),
    ],
)
def test_refusals_of_groups(shape, options, words):
    with pytest.raises(ValueError, match=words):
        NorMuon([{"params": parameters([shape]), **options}])
    good = NorMuon(parameters())
    with pytest.raises(ValueError, match=words):
        good.add_param_group({"params": parameters([shape]), **options})
    assert len(good.param_groups) == 1, "the refused group is not kept"


def test_refusals_of_tensors():
    with pytest.raises(ValueError, match="real"):
        NorMuon([Parameter(torch.randn(3, 3, dtype=torch.complex64))])
    p = Parameter(torch.randn(3, 3))
    p.grad = torch.eye(3).to_sparse()
    for kind in ("matrix", "adamw"):
        with pytest.raises(ValueError, match="dense"):
            NorMuon([{"params": [p], "kind": kind}]).step()
    with pytest.raises(TypeError, match="weigth_decay"):
        NorMuon(parameters(), weigth_decay=0.5)
    with pytest.raises(TypeError, match="beta2"):
        Muon(parameters(), beta2=0.5)
    params = parameters()
    optimizer = NorMuon(params)
    run(optimizer, params, 1)
    optimizer.param_groups[0]["axis"] = "column"
    with pytest.raises(ValueError, match="axis or layout"):
        run(optimizer, params, 1)
    assert update_stats(fresh := NorMuon(parameters())) == {} and not fresh.state
    with pytest.raises(ValueError, match="huge"):
        convert_lr(0.1, "huge", "rms", 3, 3)


def test_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NorMuon(parameters(), lr=1e-3)
        with pytest.raises(UserWarning, match="embedding"):
            NorMuon([("wte.weight", parameters([(9, 4)])[0])])
        with pytest.raises(UserWarning, match="embedding"):
            NorMuon(parameters([(100, 4)]))
        with pytest.raises(UserWarning, match="embedding"):
            NorMuon(parameters([(4, 100)]))
        with pytest.raises(UserWarning, match="pos_embed"):
            NorMuon([("encoder.pos_embed", parameters([(1, 9, 4)])[0])])
        with pytest.raises(UserWarning, match="convert_lr"):
            NorMuon(parameters(), lr=0.02)
