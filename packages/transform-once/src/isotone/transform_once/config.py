"""What a model is: frozen, saved beside its weights as JSON, and validated here.

Defaults are the paper's for Navier-Stokes at 64 x 64, where it names them (section 2.8); a grid of any dimension from 1
to 3 is meant by the number of `modes`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from isotone.shared.errors import InputError, check_count
from isotone.transform_once import transforms
from isotone.transform_once.initializers import INITS

ACTIVATIONS = ("gelu", "sin", "relu", "identity")
GRIDS = ("closed", "periodic")
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class OperatorConfig:
    """What every model has. `modes` kept an axis (a number counts for the dimensions of `dims`), `in_channels`,
    `out_channels`; `grid`: of the coordinates that are appended, "closed" linspace(0, 1, N) with both ends, as the
    official code has it, or "periodic" without the last; `dtype` of the layers, transforms staying exact."""

    modes: int | tuple[int, ...] = (24, 24)
    in_channels: int = 1
    out_channels: int = 1
    width: int = 48
    depth: int = 8
    activation: str = "gelu"
    init: str = "vp"
    dims: int = 2
    grid: str = "closed"
    dtype: str = "float32"
    head_width: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.modes, (list, tuple)):
            object.__setattr__(self, "modes", tuple(self.modes))
            object.__setattr__(self, "dims", len(self.modes))
        for name in ("in_channels", "out_channels", "width", "depth", "head_width", "dims"):
            check_count(name, getattr(self, name))
        if self.dims > 3:
            raise InputError(f"expected modes for 1, 2 or 3 axes, got {self.dims}")
        for m in self.axes_modes:
            check_count("modes", m)
        for name, known in (("activation", ACTIVATIONS), ("init", INITS), ("grid", GRIDS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise InputError(f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def axes_modes(self) -> tuple[int, ...]:
        """Modes of each axis."""
        return self.modes if isinstance(self.modes, tuple) else (self.modes,) * self.dims

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the name of the class."""
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class T1Config(OperatorConfig):
    """The paper's model (section 2.3).

    `transform` "dct" or "dft"; `residual` around each layer; `keep_high`: modes past the block go through unchanged;
    `padding` zeros at the far end of each axis; `first_layer_init_only`: `init` in the first layer and "kaiming" after,
    which is what a deep "vp" stack wants, since truncation happens once; `head_scale`: deviation of the head's weights;
    `sizes`: the grid that "vp" counts on and that coefficients of other grids are scaled to (None: 64 an axis).
    """

    transform: str = "dct"
    residual: bool = True
    keep_high: bool = False
    padding: int = 0
    first_layer_init_only: bool = False
    head_scale: float = 1e-8
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform not in transforms.KINDS:
            raise InputError(f"expected a transform of {', '.join(transforms.KINDS)}, got {self.transform!r}")
        check_count("padding", self.padding, 0)
        if not (math.isfinite(self.head_scale) and self.head_scale > 0):
            raise InputError(f"expected a finite head_scale above 0, got {self.head_scale}")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            assert self.sizes is not None
            if len(self.sizes) != self.dims:
                raise InputError(f"expected {self.dims} sizes, got {self.sizes}")
            transforms.Transform(self.transform, tuple(n + self.padding for n in self.sizes), self.axes_modes)
        if self.transform == "dft" and self.dtype == "bfloat16":
            raise InputError("expected dtype float32 with transform dft, whose layers are complex, got bfloat16")
        if self.keep_high and self.transform == "dft":
            raise InputError("expected transform dct with keep_high, got dft")


@dataclass(frozen=True)
class T1UConfig(T1Config):
    """T1U (section 2.4): the spectrum's block as a picture through a U-Net of `exponent` e, 2^e channels at its top;
    `operator_layer`: a T1 layer before it; `depth`: the most halvings, of which a block of m modes has log2 m."""

    exponent: int = 5
    operator_layer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("exponent", self.exponent)
        if self.transform != "dct" or self.keep_high:
            raise InputError("expected transform dct and no keep_high for T1U")


@dataclass(frozen=True)
class MLPConfig(T1Config):
    """A plain network on the truncated spectrum: `depth` dense layers of `width` over all modes at once."""

    init: str = "kaiming"


@dataclass(frozen=True)
class FNOConfig(OperatorConfig):
    """The Fourier neural operator (section 2.2), complex buffers kept.

    `skip` "linear": 1 x 1 convolution and, with `residual`, the identity beside it, as the official baseline has;
    `last_activation`: also after the last layer; `fft`: "fft", or "matmul" with the truncated DFT as matrices.
    """

    width: int = 32
    depth: int = 6
    init: str = "naive"
    residual: bool = True
    last_activation: bool = True
    fft: str = "fft"
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            assert self.sizes is not None
            if len(self.sizes) != self.dims:
                raise InputError(f"expected {self.dims} sizes, got {self.sizes}")
        if self.fft not in ("fft", "matmul"):
            raise InputError(f"expected fft to be fft or matmul, got {self.fft!r}")


@dataclass(frozen=True)
class FFNOConfig(OperatorConfig):
    """The factorised FNO (section 2.9): one axis at a time, feed-forward of 2 W, x - b from layer to layer."""

    modes: int | tuple[int, ...] = (32, 32)
    width: int = 82
    depth: int = 10
    activation: str = "relu"


@dataclass(frozen=True)
class UNetConfig(OperatorConfig):
    """A U-Net on the field (Deep-Flow-Prediction's), 2^exponent channels at its top, `depth` halvings; of `modes` only
    the number of axes counts."""

    depth: int = 6
    exponent: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("exponent", self.exponent)


CONFIGS = {kind.__name__: kind for kind in (T1Config, T1UConfig, MLPConfig, FNOConfig, FFNOConfig, UNetConfig)}


def from_dict(state: dict[str, Any]) -> OperatorConfig:
    """The inverse of `to_dict`. Raises `InputError` on an unknown kind or field."""
    values = dict(state)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise InputError(f"expected a config of {', '.join(CONFIGS)}, got {kind!r}")
    known = {field.name for field in dataclasses.fields(CONFIGS[kind])}
    if unknown := sorted(set(values) - known):
        raise InputError(f"expected fields of {kind}, got {', '.join(unknown)}")
    for name in ("modes", "sizes"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    try:
        return CONFIGS[kind](**values)
    except TypeError as error:
        raise InputError(f"expected fields of {kind} of their own types: {error}") from None
