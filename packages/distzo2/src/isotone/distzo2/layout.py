"""What moves together: the blocks of a model, the tensors that stay, and the flat buckets that their views share.

Any module with a `ModuleList` of like layers will do; nothing of a model is rewritten. A tensor is known by its
storage, so that a tied embedding is one tensor with one direction and one update, and stays on the device if blocks and
the rest share it (section 7, pitfalls).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isotone.shared.errors import InputError

GROUP = 4
"""Elements of a bucket that one call of the generator makes: parameters and slices begin at multiples of it."""


@dataclass(frozen=True)
class Segment:
    """`length` elements from `start` of a flat buffer: those from `first` on of parameter number `parameter`.

    `decays`: whether weight decay applies to them.
    """

    parameter: int
    first: int
    start: int
    length: int
    decays: bool


@dataclass
class Entry:
    """One tensor in a bucket: every `nn.Parameter` that shares it, its number, and where it lies."""

    name: str
    parameters: list[nn.Parameter]
    number: int
    offset: int
    shape: torch.Size
    decays: bool

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass
class Bucket:
    """Tensors of one type in one flat buffer of `size` elements, a multiple of GROUP times the number of slices."""

    entries: list[Entry]
    dtype: torch.dtype
    trainable: bool
    size: int
    _views: dict[tuple[int, torch.dtype], list[Tensor]] = field(default_factory=dict, repr=False)

    def segments(self, start: int = 0, stop: int | None = None) -> list[Segment]:
        """What elements `start` to `stop` of the buffer are, counted from `start`."""
        stop = self.size if stop is None else stop
        found = []
        for entry in self.entries:
            low, high = max(start, entry.offset), min(stop, entry.offset + entry.numel)
            if low < high:
                at = (entry.number, low - entry.offset, low - start, high - low)
                found.append(Segment(*at, decays=entry.decays))
        return found

    def point(self, flat: Tensor) -> None:
        """Make the parameters views of `flat`, a buffer of `size` elements that lives on."""
        key = (flat.data_ptr(), flat.dtype)
        if key not in self._views:
            if len(self._views) > 16:
                self._views.clear()
            self._views[key] = [flat[e.offset : e.offset + e.numel].view(e.shape) for e in self.entries]
        for entry, view in zip(self.entries, self._views[key], strict=True):
            for parameter in entry.parameters:
                parameter.data = view

    def gather(self, flat: Tensor) -> None:
        """Write the parameters' present values into `flat`."""
        for entry in self.entries:
            flat[entry.offset : entry.offset + entry.numel] = entry.parameters[0].detach().reshape(-1)

    def values(self, flat: Tensor) -> dict[int, Tensor]:
        """The tensors of `flat` by the ids of their parameters."""
        found: dict[int, Tensor] = {}
        for e in self.entries:
            view = flat[e.offset : e.offset + e.numel].view(e.shape)
            found |= {id(parameter): view for parameter in e.parameters}
        return found

    def take(self, flat: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write the tensors of `state` into `flat` by name."""
        for e in self.entries:
            flat[e.offset : e.offset + e.numel] = state[e.name].reshape(-1).to(flat.device, flat.dtype)


@dataclass
class Unit:
    """A block, or all that stays on the device: its buckets, one for each type and for what is trained and what not."""

    name: str
    module: nn.Module | None
    buckets: list[Bucket]


@dataclass
class Layout:
    """A model cut into units. `trained`, `sizes`, `dtypes`: the trained tensors' names, elements, types by number."""

    blocks: list[Unit]
    resident: Unit
    trained: list[str]
    sizes: list[int]
    dtypes: list[torch.dtype]


def find_blocks(model: nn.Module, path: str = "auto") -> tuple[str, nn.ModuleList]:
    """The list of a model's layers: at `path`, or the `ModuleList` of like modules with the most parameters.

    Raises `InputError` where there is none, and says how to name it.
    """
    if path != "auto":
        try:
            named = model.get_submodule(path)
        except AttributeError:
            named = None
        if not isinstance(named, nn.ModuleList) or not len(named):
            raise InputError(f"expected blocks to name a ModuleList of {type(model).__name__}, got {path!r}")
        return path, named
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    alike = [(name, part) for name, part in lists if len({type(block) for block in part}) == 1]
    if not alike:
        raise InputError(
            f'expected a ModuleList of layers in {type(model).__name__}, found none; name it as blocks="model.layers"'
        )
    return max(alike, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def decaying(model: nn.Module) -> set[int]:
    """The ids of the parameters that weight decay applies to: by role, all but biases and what norm modules own.

    The reference goes by pieces of names (section 2.2), of which "ln" is in others' too.
    """
    found = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if not is_norm and name.rpartition(".")[2] != "bias":
                found.add(id(parameter))
    return found


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of a model's trained parameters for an optimizer: with `weight_decay`, and without (norms, biases).

    Their "numbers" are the parameters' places in `named_parameters`, by which `MeZO` draws their directions.
    """
    decays = decaying(model)
    groups: list[dict[str, Any]] = [
        {"params": [], "numbers": [], "weight_decay": weight_decay},
        {"params": [], "numbers": [], "weight_decay": 0.0},
    ]
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        group = groups[id(parameter) not in decays]
        group["params"].append(parameter)
        group["numbers"].append(number)
    return [group for group in groups if group["params"]]


def lay_out(model: nn.Module, blocks: str = "auto", slices: int = 1) -> Layout:
    """Cut `model` into blocks and what stays, each with its flat buckets padded for `slices` equal slices.

    Tensors are numbered in the order of `named_parameters`, trained ones alone. Raises `InputError` for parameters on
    the meta device, for storage that overlaps in part, and where nothing is trained.
    """
    path, modules = find_blocks(model, blocks)
    tensors = _by_storage(model)
    if not any(tensor.trainable for tensor in tensors):
        raise InputError("expected parameters to train, got requires_grad=False everywhere")
    home = {id(p): number for number, module in enumerate(modules) for p in module.parameters()}
    outside = {id(p) for p in _outside(model, path)}
    numbers = {id(t): i for i, t in enumerate(tensor for tensor in tensors if tensor.trainable)}
    decays = decaying(model)
    piles: list[list[_Tensor]] = [[] for _ in range(len(modules) + 1)]
    for tensor in tensors:
        homes = {home.get(id(p), -1) for p in tensor.parameters} | {-1 for p in tensor.parameters if id(p) in outside}
        shared = len(homes) > 1 or homes == {-1} or _in_two_blocks(tensor, modules)
        piles[-1 if shared else homes.pop()].append(tensor)
    units = [
        Unit(f"{path}.{number}" if number < len(modules) else "resident", module, _buckets(pile, numbers, decays, pad))
        for number, (pile, module, pad) in enumerate(
            zip(piles, [*modules, None], [slices] * len(modules) + [1], strict=True)
        )
    ]
    trained = [tensor for tensor in tensors if tensor.trainable]
    first = [tensor.parameters[0] for tensor in trained]
    return Layout(
        *(units[:-1], units[-1], [tensor.name for tensor in trained]),
        *([p.numel() for p in first], [p.dtype for p in first]),
    )


def lay_tensors(model: nn.Module, decays: set[int]) -> list[Bucket]:
    """Every tensor of a model in a bucket of its own, numbered as `lay_out` numbers them."""
    tensors = _by_storage(model)
    numbers = {id(t): i for i, t in enumerate(tensor for tensor in tensors if tensor.trainable)}
    return [bucket for tensor in tensors for bucket in _buckets([tensor], numbers, decays, 1)]


@dataclass
class _Tensor:
    name: str
    parameters: list[nn.Parameter]

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.parameters)


def _by_storage(model: nn.Module) -> list[_Tensor]:
    """The distinct tensors of a model, each with the parameters that are it, in the order of `named_parameters`."""
    found: dict[tuple[Any, ...], _Tensor] = {}
    spans: dict[int, list[tuple[int, int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"expected parameters with values, got {name} on the meta device")
        start = int(parameter.storage_offset())
        key: tuple[Any, ...] = (
            parameter.untyped_storage().data_ptr(),
            start,
            parameter.shape,
            parameter.stride(),
            parameter.dtype,
        )
        if not parameter.numel():
            key = (id(parameter),)
        if key in found:
            found[key].parameters.append(parameter)
            continue
        span = (start, start + parameter.numel())
        overlaps = spans.setdefault(parameter.untyped_storage().data_ptr(), [])
        if parameter.numel() and any(span[0] < high and low < span[1] for low, high in overlaps):
            raise InputError(f"expected tensors that are shared whole or not at all, got {name}, a part of another")
        overlaps.append(span)
        found[key] = _Tensor(name, [parameter])
    return list(found.values())


def _outside(model: nn.Module, path: str) -> Iterable[nn.Parameter]:
    """The parameters that modules outside the list of blocks own, those tied to blocks' included."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name != path and not name.startswith(path + "."):
            yield from module.parameters(recurse=False)


def _in_two_blocks(tensor: _Tensor, modules: Iterable[nn.Module]) -> bool:
    ids = {id(p) for p in tensor.parameters}
    return sum(any(id(p) in ids for p in module.parameters()) for module in modules) > 1


def _buckets(pile: list[_Tensor], numbers: dict[int, int], decays: set[int], slices: int) -> list[Bucket]:
    kinds: dict[tuple[torch.dtype, bool], list[_Tensor]] = {}
    for tensor in pile:
        kinds.setdefault((tensor.parameters[0].dtype, tensor.trainable), []).append(tensor)
    buckets = []
    for (dtype, trainable), members in kinds.items():
        if trainable and not dtype.is_floating_point:
            raise InputError(f"expected floating-point parameters to train, got {members[0].name} of {dtype}")
        entries, offset = [], 0
        for tensor in members:
            first = tensor.parameters[0]
            decaying_here = any(id(p) in decays for p in tensor.parameters)
            number = numbers.get(id(tensor), -1)
            entries.append(Entry(tensor.name, tensor.parameters, number, offset, first.shape, decaying_here))
            offset += -(-first.numel() // GROUP) * GROUP
        step = GROUP * slices
        buckets.append(Bucket(entries, dtype, trainable, -(-offset // step) * step))
    return buckets
