"""T1: operator learning with a single transform.

One orthonormal DCT, a deep network on the lowest modes with its loss there, and no way back until a field is asked for;
beside it the frequency-domain models it replaces, the solvers that made our data, and the choice of how many modes.
"""

from isotone.transform_once.config import (
    FFNOConfig,
    FNOConfig,
    MLPConfig,
    T1Config,
    T1UConfig,
    UNetConfig,
)
from isotone.transform_once.fno import FFNO, FNO
from isotone.transform_once.models import make_model
from isotone.transform_once.modes import energy_spectrum, irreducible_error, select_modes
from isotone.transform_once.operator import Operator
from isotone.transform_once.t1 import MLP, T1, T1U
from isotone.transform_once.transforms import Transform, dct, idct
from isotone.transform_once.unet import UNet

__version__ = "0.1.0"
__all__ = [
    "FFNO",
    "FNO",
    "MLP",
    "T1",
    "T1U",
    "FFNOConfig",
    "FNOConfig",
    "MLPConfig",
    "Operator",
    "T1Config",
    "T1UConfig",
    "Transform",
    "UNet",
    "UNetConfig",
    "dct",
    "energy_spectrum",
    "idct",
    "irreducible_error",
    "make_model",
    "select_modes",
]
