"""Functions of spawned ranks: each runs every case of its world size and returns full weights."""

import warnings

import torch

STEPS = 10
# rows not divisible by the ranks, fewer rows than ranks, three of one shape (K not divisible either)
SHAPES = [(10, 6), (10, 6), (10, 6), (3, 8), (7, 5), (8, 4, 6), (6, 4, 3, 3)]


def initial():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step, rank=None):
    generator = torch.Generator().manual_seed(100 + step + (0 if rank is None else 1000 * (rank + 1)))
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def mean_gradients(step, world):
    return [sum(parts) / world for parts in zip(*(gradients(step, rank) for rank in range(world)), strict=True)]


def make(parameters, settings):
    from isotone.normuon import Muon, NorMuon

    kind = NorMuon if settings.get("normuon", True) else Muon
    options = {key: value for key, value in settings.items() if key not in ("normuon", "wire")}
    if "wire" in settings:
        options["wire_dtype"] = getattr(torch, settings["wire"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(parameters, lr=options.pop("lr", 1e-3), **options)


def single(settings, steps=STEPS, grads=gradients):
    """The weights of one process, without any process group."""
    parameters = [torch.nn.Parameter(w) for w in initial()]
    optimizer = make(parameters, settings)
    for step in range(steps):
        for parameter, gradient in zip(parameters, grads(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in parameters]


def placements_for(layout, ndim):
    from torch.distributed.tensor import Replicate, Shard

    if layout == "columns":
        return Shard(2) if ndim == 3 else Shard(1)
    return {"rows": Shard(0), "replicate": Replicate()}[layout]


def sharded(mesh, layout, settings, steps=STEPS):
    from torch.distributed.tensor import Replicate, distribute_tensor

    def distribute(tensor):
        placement = [Replicate()] * (mesh.ndim - 1) + [placements_for(layout, tensor.ndim)]
        return distribute_tensor(tensor, mesh, placement)

    parameters = [torch.nn.Parameter(distribute(w)) for w in initial()]
    optimizer = make(parameters, settings)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = distribute(gradient)
        optimizer.step()
    return [p.detach().full_tensor().clone() for p in parameters]


def replicated(mesh, strategy, settings):
    rank, world = mesh.get_local_rank(), mesh.size()
    parameters = [torch.nn.Parameter(w) for w in initial()]
    optimizer = make(
        parameters, {**settings, "mesh": mesh.get_group() if strategy == "round_robin" else mesh, "strategy": strategy}
    )
    for step in range(STEPS):
        grads = gradients(step, rank) if strategy == "reduce_scatter" else mean_gradients(step, world)
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in parameters]


CASES = {
    "plain": {},
    "muon": {"normuon": False},
    "column": {"axis": "column", "scale": "spectral"},
    "auto": {"axis": "auto", "scale": "original", "cautious": True},
    "match": {"scale": "match_rms_adamw", "orthogonalize": "ns5", "nesterov": False},
}


CASES_OF = {1: ["plain"], 3: ["plain", "column", "auto"]}  # the others run every case


def all_cases(rank, world, folder):
    """Every layout and setting on the first 1, 2, ... of the ranks: {(size, layout, case): weights}.

    One spawn serves all sizes: a mesh of fewer ranks is a group of its own, and the others stay out of it. At the
    end, FSDP2 training is saved by the first two ranks and loaded by all.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    found = {}
    for size in range(1, world + 1):
        mesh = DeviceMesh("cpu", torch.arange(size))
        if rank >= size:
            continue
        for layout in ("rows", "columns", "replicate"):
            for case, settings in CASES.items():
                if case in CASES_OF.get(size, CASES):
                    found[size, layout, case] = sharded(mesh, layout, settings)
        found[size, "rows", "bf16"] = sharded(mesh, "rows", {"wire": "bfloat16"})
        for strategy in ("round_robin", "reduce_scatter"):
            for case in ("plain", "muon", "column"):
                found[size, strategy, case] = replicated(mesh, strategy, CASES[case])
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    found[world, "hsdp", "plain"] = sharded(mesh, "rows", {})
    found["refusals"] = refusals(rank, world)
    pair = DeviceMesh("cpu", torch.arange(2))
    if rank < 2:
        found["saved"] = fsdp(pair, folder, save=True)
    dist.barrier()
    found["loaded"] = fsdp(DeviceMesh("cpu", torch.arange(world)), folder, save=False)
    return found if rank == 0 else None


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 6),
        torch.nn.Linear(6, 10),
        torch.nn.ReLU(),
        torch.nn.Linear(10, 7),
        torch.nn.LayerNorm(7),
    )


def train(net, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 11, (8,), generator=generator)
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


def fsdp(mesh, folder, save):
    """FSDP2 training with uneven shards; DCP saved after three steps, or loaded there; weights after six."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    from isotone.normuon import NorMuon, split_params

    net = model()
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = NorMuon(split_params(net), lr=1e-3)
    if save:
        train(net, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    if save:
        dcp.save(state, checkpoint_id=folder, process_group=mesh.get_group())
    else:
        dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
        set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    held = [p.detach().full_tensor().clone() for p in net.parameters()]
    for p in net.parameters():
        for key, value in sorted(optimizer.state[p].items()):
            held.append((value if key == "step" else value.full_tensor()).clone())
    train(net, optimizer, range(3, 6))
    return held, [p.detach().full_tensor().clone() for p in net.parameters()]


def uninterrupted(steps=6):
    from isotone.normuon import NorMuon, split_params

    net = model()
    train(net, NorMuon(split_params(net), lr=1e-3), range(steps))
    return [p.detach() for p in net.parameters()]


def refusals(rank, world):
    """Meshes and shardings that cannot be served: the messages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from isotone.normuon import NorMuon

    mesh, grid = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world))
    found = []
    for tensor, on, placements, given in (
        (torch.randn(4, 6, 3), mesh, [Shard(1)], None),
        (torch.randn(4, 6), grid, [Shard(0), Shard(1)], None),
        (torch.randn(4, 6), grid, None, mesh),
    ):
        try:
            NorMuon([torch.nn.Parameter(distribute_tensor(tensor, on, placements))], mesh=given)
        except ValueError as error:
            found.append(str(error))
    try:
        NorMuon([torch.nn.Parameter(torch.randn(4, 6))], mesh=grid)
    except ValueError as error:
        found.append(str(error))
    return found
