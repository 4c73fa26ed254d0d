"""What spawned ranks run: every case of a world size in one spawn."""

from __future__ import annotations

import math
import os

import models
import torch
import torch.distributed as dist

from isotone.distzo2 import RankLostError, RanksDifferError, ZOConfig, ZOEngine, init_mesh, shard
from isotone.distzo2.objective import model_loss
from isotone.distzo2.training import train
from isotone.shared.errors import InputError

STEPS = 4
ROWS = 7  # unequal shards


def batches(step, family="opt"):
    """The global batch of a step; some rows ask for few tokens, one for none."""
    batch = models.batch(family, rows=ROWS, seed=step)
    if not family.endswith("classifier"):
        batch["labels"][1] = -100
        batch["labels"][2, 3:] = -100
    return batch


CASES = {
    1: {"single": (1, 1, {}), "offload": (1, 1, {"offload": "cpu"}), "k3": (1, 1, {"n_directions": 3})},
    2: {
        "pertp": (2, 1, {}),
        "pertp-sliced": (2, 1, {"offload": "cpu"}),
        "pertp-whole": (2, 1, {"offload": "cpu", "slicing": False}),
        "pertp-disk": (2, 1, {"offload": "disk"}),
        "ddp": (1, 1, {}),
        "ddp-sliced": (1, 1, {"offload": "cpu", "overlap": False}),
        "one-sided": (2, 1, {"estimator": "one_sided"}),
    },
    3: {"ddp": (1, 1, {}), "ddp-sliced": (1, 1, {"offload": "cpu"}), "k3": (1, 3, {"n_directions": 3})},
    4: {"2d": (2, 1, {}), "2d-sliced": (2, 1, {"offload": "cpu"}), "ddp": (1, 1, {})},
}


def run(case, folder, steps=STEPS, family="opt"):
    """g_t, scalar bytes a step and theta_T of one case on this rank."""
    pertp, directions, options = case
    mesh = init_mesh(pertp, "rest", directions) if dist.is_initialized() else None
    disk = os.path.join(folder, "disk") if options.get("offload") == "disk" else None
    engine = ZOEngine(models.make(family), ZOConfig(lr=1e-2, weight_decay=0.1, disk_folder=disk, **options), mesh)
    found = [engine.step(shard(batches(t, family), engine.ranks)) for t in range(steps)]
    sent = engine.scalar_bytes / max(steps, 1)
    return {
        "grads": [list(step.projected_grads) for step in found],
        "losses": [step.loss for step in found],
        "theta": models.state_flat(engine.trained_state()),
        "loss": engine.evaluate(shard(batches(9, family), engine.ranks)),
        "bytes": sent,
    }


def precise():
    """DDP in double precision, where the order of sums is all that differs."""
    mesh = init_mesh() if dist.is_initialized() else None
    engine = ZOEngine(models.chain(), ZOConfig(lr=1e-2), mesh, objective=models.squared_error)
    grads = [engine.step(shard(models.points(7, seed=t), engine.ranks)).projected_grad for t in range(STEPS)]
    return {"grads": grads, "theta": models.state_flat(engine.trained_state())}


def said(error, function):
    """The words of an error."""
    try:
        function()
    except error as raised:
        return str(raised)
    return ""


def not_finite(rank):
    """One rank's loss is NaN: the step is nobody's."""
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2, offload="cpu"), init_mesh())
    before = models.state_flat(engine.trained_state())
    batch = shard(batches(0), engine.ranks)

    def closure():
        loss, count = model_loss(engine.model, batch)
        return (loss * math.nan if rank == 1 else loss), count

    skipped = engine.step(closure).skipped
    return skipped and engine.skipped == 1 and torch.equal(models.state_flat(engine.trained_state()), before)


def differ(rank):
    """A block that is another on one rank, found by the check of every second step."""
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2, check_every=2), init_mesh())
    engine.step(shard(batches(0), engine.ranks))
    if rank == 1:
        engine.pipeline.rest[1][0][5] += 1e-3
    words = said(RanksDifferError, lambda: engine.step(shard(batches(1), engine.ranks)))
    engine.flush()
    return words


def failing(rank, offload):
    """Rank 1's closure fails: rank 0 is told, and without slices both go on; g_t of the steps, and what was said."""
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2, weight_decay=0.1, offload=offload), init_mesh())
    grads = [engine.step(shard(batches(0), engine.ranks)).projected_grad]

    def closure():
        if rank == 1:
            raise KeyError("closure of rank 1")
        return model_loss(engine.model, shard(batches(1), engine.ranks))

    words = said((KeyError, RankLostError), lambda: engine.step(closure))
    if offload == "none":
        grads += [engine.step(shard(batches(t), engine.ranks)).projected_grad for t in (1, 2)]
        evaluated = said((KeyError, RankLostError), lambda: engine.evaluate(closure))
        return {"words": words, "evaluated": evaluated, "grads": grads, "loss": engine.evaluate(lambda: (1.0, 2))}
    return {"words": words, "after": said(RankLostError, lambda: engine.step(closure))}


def unequal_checkpoints(rank, folder):
    """Each rank finds another checkpoint: all say so."""
    own = os.path.join(folder, f"unequal-{rank}")
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2))
    train(engine, batches, 1 + rank, folder=own)
    shared = ZOEngine(models.make(), ZOConfig(lr=1e-2), init_mesh())
    return said(InputError, lambda: train(shared, batches, 4, folder=own))


def places(rank):
    """Spans of a step with slices."""
    engine = ZOEngine(
        models.chain(dtype=torch.float32, layers=8),
        ZOConfig(lr=1e-2, offload="cpu"),
        init_mesh(),
        objective=models.squared_error,
    )
    points = shard(models.points(dtype=torch.float32), engine.ranks)
    engine.step(points)
    spans = engine.link.record()
    engine.step(points)
    return [(span.lane, span.block, span.start, span.end) for span in spans]


def other_weights(rank):
    model = models.make()
    if rank == 1:
        with torch.no_grad():
            model.model.decoder.layers[2].fc1.bias[3] += 1e-6
    return said(InputError, lambda: ZOEngine(model, ZOConfig(), init_mesh()))


def resumed(folder, until):
    """Go on to step `until` from whatever checkpoint is there."""
    mesh = (
        init_mesh(2 if dist.is_initialized() and dist.get_world_size() % 2 == 0 else 1)
        if dist.is_initialized()
        else None
    )
    config = ZOConfig(lr=1e-2, offload="cpu")
    engine = ZOEngine(models.make("opt-classifier"), config, mesh)
    history = train(
        engine, lambda step: batches(step, "opt-classifier"), until, folder=folder, checkpoint_every=2, data_id="seven"
    )
    return {"losses": history.losses, "theta": models.state_flat(engine.trained_state()), "steps": engine.steps}


def everything(rank, world, folder):
    """All cases of this world size."""
    found = {name: run(case, folder) for name, case in CASES[world].items()}
    found["precise"] = precise()
    if world == 2:
        found["first"] = run((1, 1, {}), folder, steps=1)
        found["not finite"], found["differ"], found["other"] = not_finite(rank), differ(rank), other_weights(rank)
        found["failing"], found["unequal"] = failing(rank, "none"), unequal_checkpoints(rank, folder)
        found["failing sliced"], found["places"] = failing(rank, "cpu"), places(rank)
        found["refused"] = said(InputError, lambda: init_mesh(pertp=2, ddp=2))
        found["refused pertp"] = said(InputError, lambda: init_mesh(pertp=3))
        found["odd"] = said(InputError, lambda: ZOEngine(models.make(), ZOConfig(slicing=True), init_mesh()))
        found["resumed"] = resumed(os.path.join(folder, "elastic"), 4)
    if world == 3:
        found["pertp of three"] = said(InputError, lambda: ZOEngine(models.make(), ZOConfig(parallel="pertp")))
        found["2d of three"] = said(InputError, lambda: ZOEngine(models.make(), ZOConfig(parallel="2d")))
        found["resumed"] = resumed(os.path.join(folder, "elastic"), 6)
    if world == 4:
        found["few directions"] = said(InputError, lambda: ZOEngine(models.make(), ZOConfig(), init_mesh(1, 2, 2)))
        found["one-sided over both"] = said(
            InputError,
            lambda: ZOEngine(models.make(), ZOConfig(estimator="one_sided", n_directions=2), init_mesh(2, 1, 2)),
        )
        found["named"] = ZOEngine(models.make(), ZOConfig(parallel="2d")).ranks.data_size
        found["resumed"] = resumed(os.path.join(folder, "elastic"), 8)
    return found


def killed(rank, world, folder):
    """Rank 1 ends in the midst of a step; the other says so in a sentence, and writes it where it can be read."""
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2, offload="cpu"), init_mesh())
    engine.step(shard(batches(0), engine.ranks))
    if rank == 1:
        os._exit(7)
    try:
        engine.step(shard(batches(1), engine.ranks))
    except RankLostError as error:
        with open(os.path.join(folder, f"rank-{rank}"), "w") as file:
            file.write(str(error))
        raise
