"""From a config to its model."""

from __future__ import annotations

from flax import nnx

from isotone.transform_once.config import (
    FFNOConfig,
    FNOConfig,
    MLPConfig,
    OperatorConfig,
    T1Config,
    T1UConfig,
    UNetConfig,
)
from isotone.transform_once.fno import FFNO, FNO
from isotone.transform_once.operator import Operator
from isotone.transform_once.t1 import MLP, T1, T1U
from isotone.transform_once.unet import UNet

MODELS: dict[type[OperatorConfig], type[Operator]] = {
    T1Config: T1,
    T1UConfig: T1U,
    MLPConfig: MLP,
    FNOConfig: FNO,
    FFNOConfig: FFNO,
    UNetConfig: UNet,
}


def make_model(config: OperatorConfig, seed: int = 0) -> Operator:
    """The model of a config, its weights from `seed`."""
    return MODELS[type(config)](config, rngs=nnx.Rngs(seed))  # type: ignore[call-arg]
