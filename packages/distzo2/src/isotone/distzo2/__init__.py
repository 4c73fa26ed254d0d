"""DistZO2: fine-tune a model that does not fit, with two forward passes and as many devices as there are.

`ZOEngine` takes a zeroth-order step on any Hugging Face causal or classification model: each block comes to the device
once, gets the last step's update, carries both perturbed forwards and leaves. Ranks share the directions, the data and
the moving of blocks, and send 24 bytes of scalars a step. `MeZO` is the same as a torch optimizer, for a model that is
in memory.
"""

from isotone.distzo2.config import ZOConfig
from isotone.distzo2.data import Windows, ZipfMarkov, keyword_batch
from isotone.distzo2.distributed import RankLostError, Ranks, init_mesh, shard
from isotone.distzo2.engine import RanksDifferError, ZOEngine, ZOStep
from isotone.distzo2.kernels import Update, advance, round_to
from isotone.distzo2.layout import find_blocks, parameter_groups
from isotone.distzo2.link import Link, Span, ThrottledLink
from isotone.distzo2.mezo import MeZO
from isotone.distzo2.objective import label_words, model_loss
from isotone.distzo2.rng import normal, philox, step_seed
from isotone.distzo2.trajectory import Trajectory, base_hash, load_trajectory, replay, save_trajectory

__version__ = "0.1.0"
__all__ = [
    "Link",
    "MeZO",
    "RankLostError",
    "Ranks",
    "RanksDifferError",
    "Span",
    "ThrottledLink",
    "Trajectory",
    "Update",
    "Windows",
    "ZOConfig",
    "ZOEngine",
    "ZOStep",
    "ZipfMarkov",
    "advance",
    "base_hash",
    "find_blocks",
    "init_mesh",
    "keyword_batch",
    "label_words",
    "load_trajectory",
    "model_loss",
    "normal",
    "parameter_groups",
    "philox",
    "replay",
    "round_to",
    "save_trajectory",
    "shard",
    "step_seed",
]
