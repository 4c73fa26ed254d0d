"""What is held against PyTorch: masks and weights there and back, SGD, the peer of the bench."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from isotone.concrete_tickets import Recipe, Ticket, Trainer, bench, from_torch, magnitude, prune_torch, train
from isotone.concrete_tickets.images import load_images
from isotone.concrete_tickets.layout import named_weights
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.torch_masks import from_torch_order, to_torch_order, torch_state
from isotone.shared.errors import InputError

PARAMS, DATA = toy.params(), toy.data()


@pytest.fixture
def torch():
    # imported where it is used: it takes seconds, and every worker collects this file
    return pytest.importorskip("torch")


def test_training_is_torch_sgd(torch):
    """Six steps of clip, decay, momentum and the falling rate, against torch's own optimizer."""
    recipe = Recipe(epochs=6, batch_size=64, milestones=(0.5,), lr=0.05)
    ours = train(Trainer(toy.apply, recipe), PARAMS, DATA)
    weights = [torch.tensor(np.asarray(PARAMS[f"l{i}"][k]), requires_grad=True) for i in range(3)
               for k in ("kernel", "bias")]  # fmt: skip
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=5e-4)
    x, y = torch.tensor(np.asarray(DATA[0])), torch.tensor(np.asarray(DATA[1])).long()
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * (0.1 if epoch >= 3 else 1)
        z = x
        for i in range(3):
            z = z @ weights[2 * i] + weights[2 * i + 1]
            z = torch.relu(z) if i < 2 else z
        loss = torch.nn.functional.cross_entropy(z, y, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 2.0)
        optimizer.step()
        assert np.isclose(ours.losses[epoch], loss.item() / 64, rtol=1e-4)
    assert np.allclose(ours.params["l1"]["kernel"], weights[2].detach().numpy(), atol=1e-5)


def test_lenet_in_torch_is_ours(torch):
    """Weights exported by name and order, in a torch network with batch statistics: the same logits."""
    network = make_model("lenet", (8, 8, 1), 10)
    params = network.init(jax.random.key(0))
    params["norms"][0]["bias"] = jnp.arange(6) / 5
    leaves = {name: np.asarray(leaf) for name, leaf in named_weights(params, lambda name, leaf: True).items()}
    state = torch_state(leaves, {}, network.flattened)

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            conv = functools.partial(torch.nn.Conv2d, kernel_size=5, padding=2, bias=False)
            self.convs = torch.nn.ModuleList([conv(1, 6), conv(6, 16)])
            self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(c, track_running_stats=False) for c in (6, 16)])
            self.denses = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in ((64, 120), (120, 84), (84, 10))])

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = torch.nn.functional.max_pool2d(torch.relu(norm(conv(x))), 2)
            x = x.flatten(1)
            return self.denses[2](torch.relu(self.denses[1](torch.relu(self.denses[0](x)))))

    theirs = Theirs()
    theirs.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    x = np.random.default_rng(0).standard_normal((6, 8, 8, 1)).astype(np.float32)
    turned = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    assert np.allclose(theirs(turned).detach().numpy(), network.apply(params, jnp.asarray(x)), atol=1e-4)
    ticket = magnitude(params, 0.3, network.where)
    prune_torch(theirs, ticket, flattened=network.flattened)
    sparse = network.apply(ticket.apply(params), jnp.asarray(x))
    assert np.allclose(theirs(turned).detach().numpy(), sparse, atol=1e-4)
    back = from_torch(theirs, flattened=network.flattened)
    assert all(np.array_equal(back.masks[name], mask) for name, mask in ticket.masks.items())
    with pytest.raises(InputError, match=r"picture of \(3, 3, 16\), got one of 64 inputs"):
        prune_torch(theirs, ticket, flattened={"denses/0/kernel": (3, 3, 16)})


def test_torch_round_trip(torch):
    scores = {
        "conv/kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)),
        "dense/kernel": jax.random.normal(jax.random.key(1), (5, 3)),
    }
    ticket = Ticket.from_scores(scores, 0.4)
    module = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(2, 4, 3), "dense": torch.nn.Linear(5, 3)})
    prune_torch(module, ticket)
    assert int((module["dense"].weight == 0).sum()) == 15 - int(ticket.masks["dense/kernel"].sum())
    back = from_torch(module)
    assert all(np.array_equal(back.masks[n], m) for n, m in ticket.masks.items())
    # the same function: torch's convolution at its masked weights is jax's at ours
    kernel = jax.random.normal(jax.random.key(2), (3, 3, 2, 4)) * ticket.masks["conv/kernel"]
    x = jax.random.normal(jax.random.key(3), (1, 6, 6, 2))
    ours = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    weight = torch.from_numpy(to_torch_order(kernel))
    theirs = torch.nn.functional.conv2d(torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)), weight)
    assert np.allclose(np.asarray(ours).transpose(0, 3, 1, 2), theirs.numpy(), atol=1e-4)
    assert np.array_equal(from_torch_order(to_torch_order(kernel)), kernel)
    with pytest.raises(InputError, match="dense.weight"):
        prune_torch(torch.nn.ModuleDict({"conv": torch.nn.Conv2d(2, 4, 3)}), ticket)
    with pytest.raises(InputError, match="shape"):
        wrong = {"conv": torch.nn.Conv2d(2, 4, 3), "dense": torch.nn.Linear(6, 3)}
        prune_torch(torch.nn.ModuleDict(wrong), ticket)
    with pytest.raises(InputError, match="without a mask"):
        from_torch(torch.nn.Linear(2, 2))


def test_the_benchs_peer_is_the_same_search(torch):
    experiment = bench._experiment("mlp", load_images("digits"))
    params = experiment.model.init(jax.random.key(0))
    assert bench.check_equal_to_torch(experiment, params) < 1e-3
    worse = jax.tree.map(lambda x: x, params)
    worse["layers"][0]["kernel"] = worse["layers"][0]["kernel"] * 1.01
    peer = bench.TorchSearch(experiment, worse, "cpu")
    logits = peer.run(3)
    assert logits.shape == (50_200,) and float(logits.std()) > 0
