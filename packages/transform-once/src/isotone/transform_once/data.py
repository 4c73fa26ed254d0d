"""The user's fields from files, and ours from the solvers: inputs and targets on one grid, channels last.

What a file holds is read in `readers`; here its shapes are judged. An array may come with or without a channel axis:
its shape tells, or `channels` does, and what could be either is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from isotone.shared.checkpoint import atomic_write
from isotone.shared.data import sha256
from isotone.shared.errors import InputError, check_count
from isotone.transform_once.readers import Content, read
from isotone.transform_once.solvers import joukowski, navier_stokes, plume
from isotone.transform_once.solvers.plume import PlumeConfig

PROBLEMS = ("navier-stokes", "joukowski", "plume")
ORDERS = (0, 1, 2)


@dataclass(frozen=True)
class Fields:
    """`inputs` (samples, N1, .., Nd, C), `targets` of the same grid; `frames`: how many frames the inputs' channels
    are, oldest first (a rollout's context); `name` and `sha256` of where they came from; `trajectory`: of each sample
    the number of the trajectory that it is a window of, in the order of time; `step`: frames from the last of the
    inputs' to the target."""

    inputs: np.ndarray
    targets: np.ndarray
    name: str = "fields"
    sha256: str = ""
    frames: int = 1
    about: dict[str, Any] = field(default_factory=dict)
    trajectory: np.ndarray | None = None
    step: int = 1

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The grid."""
        return self.inputs.shape[1:-1]

    def split(self, test: int | float, seed: int | None = None) -> tuple[Fields, Fields]:
        """Training and test samples: the last `test` of them, a number or a share; with a seed, of a random order.

        Windows of trajectories are cut by trajectory, of which `test` is then a number or a share: no trajectory is on
        both sides. Raises `InputError` where one side would be empty.
        """
        groups = np.arange(len(self)) if self.trajectory is None else self.trajectory
        whole = np.unique(groups)
        what = "samples" if self.trajectory is None else "trajectories"
        share = isinstance(test, float)
        count = max(1, round(test * len(whole))) if share and 0 < test < 1 else 0 if share else test
        if not 0 < count < len(whole):
            raise InputError(f"expected a test split that leaves both sides some of {len(whole)} {what}, got {test}")
        order = whole if seed is None else np.random.default_rng(seed).permutation(whole)
        if self.trajectory is None:
            return self.take(order[:-count]), self.take(order[-count:])
        tested = np.isin(groups, order[-count:])
        return self.take(np.flatnonzero(~tested)), self.take(np.flatnonzero(tested))

    def take(self, rows: np.ndarray | slice) -> Fields:
        """Some samples."""
        numbers = None if self.trajectory is None else self.trajectory[rows]
        return dataclasses.replace(self, inputs=self.inputs[rows], targets=self.targets[rows], trajectory=numbers)

    def coarser(self, size: int) -> Fields:
        """Every so many-th point of each axis, to `size` points a side. Raises `InputError` where that does not
        divide."""
        if any(n % size for n in self.sizes):
            raise InputError(f"expected a size that divides the grid {self.sizes}, got {size}")
        rows = (slice(None), *(slice(None, None, n // size) for n in self.sizes))
        return dataclasses.replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def base(self, order: int) -> np.ndarray:
        """What a model of increments is added to: 0, the last frame x_t, or 2 x_t - x_{t-1} (section 2.8).

        Raises `InputError` where the inputs are not frames of the targets' channels, and for order 2 of one frame or of
        a step of several.
        """
        if order not in ORDERS:
            raise InputError(f"expected order 0, 1 or 2, got {order!r}")
        if order == 0:
            return np.zeros_like(self.targets)
        channels, given = self.targets.shape[-1], self.inputs.shape[-1]
        if given % channels or given < order * channels:
            raise InputError(f"expected {order} or more frames of {channels} channels for order {order}, got {given}")
        if order == 2 and self.step > 1:
            raise InputError(f"expected a step of 1 for order 2, got {self.step}")
        last = self.inputs[..., -channels:]
        return last if order == 1 else 2 * last - self.inputs[..., -2 * channels : given - channels]

    def increments(self, order: int) -> Fields:
        """The same samples with what `order` adds as their targets. Raises `InputError` as `base`."""
        return self if order == 0 else dataclasses.replace(self, targets=self.targets - self.base(order))

    def following(self, start: int, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The rows `start` windows into each trajectory, and the frames that follow them, `step` apart: (B, T, N1, ..,
        C), T at most `steps` and what the trajectories have. None where the samples are no windows one after another.

        Raises `InputError` where a trajectory has no window there.
        """
        if self.trajectory is None:
            return None
        courses = [np.flatnonzero(self.trajectory == number) for number in np.unique(self.trajectory)]
        channels = self.targets.shape[-1]
        for rows in courses:
            before, after = rows[: -self.step], rows[self.step :]
            if not np.array_equal(self.targets[before], self.inputs[after][..., -channels:]):
                return None
        shortest = min(len(rows) for rows in courses)
        if not 0 <= start < shortest:
            raise InputError(f"expected a start of 0 to {shortest - 1} windows into each trajectory, got {start}")
        later = range(start, min(shortest, start + steps * self.step), self.step)
        truth = np.stack([self.targets[[rows[place] for rows in courses]] for place in later], 1)
        return np.array([rows[start] for rows in courses]), truth

    def save(self, path: str | Path) -> None:
        """An .npz that `load` reads, whole before it is there."""
        buffer = io.BytesIO()
        about = {**self.about, "context": self.frames, "step": self.step, "channels": True}
        arrays = {"inputs": self.inputs, "targets": self.targets, "about": np.array(json.dumps(about))}
        if self.trajectory is not None:
            arrays["trajectory"] = self.trajectory
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), buffer.getvalue())


def load(
    path: str | Path,
    context: int | None = None,
    step: int | None = None,
    channels: bool | None = None,
    windows: tuple[int, int] = (1, 1),
) -> Fields:
    """Fields of a file by its suffix: .npz; .h5, .hdf5, .mat (extra `hdf5`); .pt, .pth (extra `torch`).

    Of a file of trajectories (n, t, N1, .., C) the pairs are windows: `context` frames as channels, and the frame
    `step` after the last of them, those of `windows` where not given. `channels`: whether the arrays' last axis is one
    of channels, where their shapes leave that open. Raises `InputError` on a missing, torn or foreign file, shapes that
    are no fields or could be two things, NaN, a file of trajectories shorter than the window, and `context` or `step`
    for a file of pairs.
    """
    path = Path(path)
    for name, value in (("context", context), ("step", step)):
        if value is not None:
            check_count(name, value)
    content = read(path)
    if None not in (channels, content.channels) and channels != content.channels:
        wanted, given = ("--channels", "--no-channels") if content.channels else ("--no-channels", "--channels")
        raise InputError(f"expected {wanted} for the arrays of {str(path)!r}, got {given}")
    channels = content.channels if channels is None else channels
    if content.frames is not None:
        frames = _trajectories(content.frames, channels, path)
        found = _windows(frames, context or windows[0], step or windows[1], path.name)
        return dataclasses.replace(found, sha256=sha256(path))
    for name, value in (("context", context), ("step", step)):
        if value is not None:
            raise InputError(f"expected no --{name} for {str(path)!r}, which holds pairs, got {value}")
    return _fields(content, channels, path)


def _fields(content: Content, channels: bool | None, path: Path) -> Fields:
    """Checked, float32, with a channel axis; targets of trajectories by their last frame."""
    assert content.inputs is not None and content.targets is not None
    inputs, targets = _checked("inputs", content.inputs, path), _checked("targets", content.targets, path)
    own, its, framed = _reading(inputs.shape, targets.shape, channels, path)
    # Burgers files hold all frames of the target: the last is what the operator gives
    targets = targets[:, -1] if framed else targets
    inputs, targets = inputs if own else inputs[..., None], targets if its else targets[..., None]
    about = dict(content.about)
    frames, step = about.pop("context", 1), about.pop("step", 1)
    for name, value in (("context", frames), ("step", step)):
        check_count(f"{name} in about of {str(path)!r}", value)
    if inputs.shape[-1] % frames:
        raise InputError(f"expected {frames} frames in {str(path)!r}, got {inputs.shape[-1]} channels")
    numbers = content.trajectory
    if numbers is not None and (numbers.shape != (len(inputs),) or not np.issubdtype(numbers.dtype, np.integer)):
        raise InputError(f"expected trajectory in {str(path)!r} as a whole number a sample, got {numbers.shape}")
    return Fields(inputs, targets, path.name, sha256(path), frames, about, numbers, step)


def _checked(name: str, array: np.ndarray, path: Path) -> np.ndarray:
    """float32, of floats (or masks) that are finite, and some of them."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == bool):
        raise InputError(f"expected real floating-point {name} in {str(path)!r}, got {array.dtype}")
    if array.ndim < 2 or not array.size:
        raise InputError(f"expected {name} (samples, N1, .., channels) in {str(path)!r}, got shape {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"expected finite {name} in {str(path)!r}, got NaN or infinity")
    return array


def _reading(
    inputs: tuple[int, ...], targets: tuple[int, ...], channels: bool | None, path: Path
) -> tuple[bool, bool, bool]:
    """Whether the inputs and the targets have a channel axis, and whether the targets are all frames (n, t, N1, ..).

    Of the readings in which both lie on one grid of 1 to 3 axes: those that `channels` leaves; without it not those
    with an axis of one point, or with as many channels as the axis before has points (16 x 16 is a grid), where there
    is another. Raises `InputError` where none is left, or several are.
    """
    ways = []
    for own, its, framed in ((a, b, f) for a in (True, False) for b in (True, False) for f in (False, True)):
        grid = inputs[1 : len(inputs) - own]
        same = inputs[0] == targets[0] and grid == targets[1 + framed : len(targets) - its]
        if same and 1 <= len(grid) <= 3 and (own == its or not framed):
            ways.append((own, its, framed))
    said = f"{inputs} and {targets}"
    if not ways:
        raise InputError(f"expected inputs and targets on one grid of 1 to 3 axes in {str(path)!r}, got {said}")
    if channels is not None:
        ways = [way for way in ways if channels == (way[0] or way[1])]
        if not ways:
            flag = "--channels" if channels else "--no-channels"
            raise InputError(f"expected shapes that {flag} fits in {str(path)!r}, got {said}")
        # of what an explicit word leaves: pairs before all frames, a channel axis in both before one in either
        return min(ways, key=lambda way: (way[2], not (way[0] and way[1])))
    for odd in (
        lambda own, its, framed: 1 in inputs[1 : len(inputs) - own],
        lambda own, its, framed: any(_square(shape) for shape, has in ((inputs, own), (targets, its)) if has),
    ):
        ways = [way for way in ways if not odd(*way)] or ways
    if len(ways) > 1:
        said = f"whose last axis may be either: {said}"
        raise InputError(f"expected --channels or --no-channels for {str(path)!r}, {said}")
    return ways[0]


def _square(shape: tuple[int, ...]) -> bool:
    return shape[-1] == shape[-2]


def _trajectories(frames: np.ndarray, channels: bool | None, path: Path) -> np.ndarray:
    """Checked frames (n, t, N1, .., Nd, C), float32."""
    frames = _checked("trajectories", frames, path)
    shape = frames.shape
    fitting = [has for has in (True, False) if 4 <= len(shape) + (not has) <= 6]
    if channels is not None:
        fitting = [has for has in fitting if has == channels]
    if not fitting:
        raise InputError(f"expected trajectories (n, t, N1, .., channels) in {str(path)!r}, got shape {shape}")
    if len(fitting) > 1 and shape[-1] != 1 and not _square(shape):
        said = "whose last axis may be either"
        raise InputError(f"expected --channels or --no-channels for {str(path)!r}, {said}: {shape}")
    has = fitting[0] if len(fitting) == 1 else shape[-1] == 1
    return frames if has else frames[..., None]


def _windows(frames: np.ndarray, context: int, step: int, name: str) -> Fields:
    """Windows of frames (n, t, N1, .., C): sample s of trajectory p is row s * n + p."""
    count, times = frames.shape[:2]
    if times < context + step:
        raise InputError(f"expected {context + step} frames or more in {name!r}, got {times}")
    starts = range(times - context - step + 1)
    inputs = np.concatenate([np.concatenate([frames[:, s + c] for c in range(context)], -1) for s in starts])
    targets = np.concatenate([frames[:, s + context + step - 1] for s in starts])
    numbers = np.tile(np.arange(count), len(starts))
    return Fields(inputs, targets, name, frames=context, trajectory=numbers, step=step)


def generate(problem: str, samples: int, size: int, seed: int = 0, **settings: Any) -> Fields:
    """Fields of a solver: "navier-stokes" (vorticity at 0 to that at `t_final`), "joukowski" (stream and mask to
    pressure and velocity), "plume" (two frames of density to the next; `frames` of each plume, height 2 `size`).

    `settings`: of the solver. Raises `InputError` on another problem.
    """
    if problem == "navier-stokes":
        first, last = navier_stokes(jax.random.key(seed), samples, size, **settings)
        return _made(first, last[:, -1], problem, samples, size, seed, settings)
    if problem == "joukowski":
        return _made(*joukowski(seed, samples, size), problem, samples, size, seed, settings)
    if problem == "plume":
        frames = settings.pop("frames", 60)
        found = plume(seed, samples, frames, PlumeConfig(2 * size, size, **settings))
        made = _windows(np.asarray(found, np.float32), 2, 1, "plume")
        fields = _made(made.inputs, made.targets, problem, samples, size, seed, {"frames": frames, **settings})
        return dataclasses.replace(fields, frames=2, trajectory=made.trajectory)
    raise InputError(f"expected a problem of {', '.join(PROBLEMS)}, got {problem!r}")


def _made(
    inputs: np.ndarray,
    targets: np.ndarray,
    problem: str,
    samples: int,
    size: int,
    seed: int,
    settings: dict[str, Any],
) -> Fields:
    about = {"problem": problem, "samples": samples, "size": size, "seed": seed, **settings}
    digest = sha256(inputs.tobytes() + targets.tobytes())
    return Fields(inputs.astype(np.float32), targets.astype(np.float32), problem, digest, about=about)
