"""Order-Preserving GFlowNets: samplers of diverse candidates that learn from comparisons alone.

A GFlowNet samples objects built step by step. The usual ones need a positive reward and an exponent for it; this one
fits the reward that the sampler itself defines to an order - pairs, or who is not dominated - so that nothing is to be
scaled, and several objectives need no weights. Grids, strings, cells and molecules; TB, DB, FM, SubTB and their
forward-looking forms; baselines on the same networks; exact distributions where a space can be enumerated.
"""

from isotone.opgfn import envs
from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import (
    DNA,
    Bag,
    BindingTable,
    Environment,
    FragmentEnv,
    Grid,
    HyperGrid,
    MOOGrid,
    NasCell,
    NGrams,
    StringEnv,
)
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.losses import (
    FLSubTB,
    TrajectoryScores,
    db_loss,
    fm_loss,
    op_db_loss,
    op_fm_loss,
    op_subtb_loss,
    op_tb_loss,
    subtb_loss,
    tb_loss,
)
from isotone.opgfn.memo import Memo
from isotone.opgfn.metrics import avg_hausdorff, gd_plus, igd_plus, pc_entropy, r2, tanimoto_diversity, top_k_mean
from isotone.opgfn.order import order_preserving_loss
from isotone.opgfn.pareto import ParetoArchive, nd_rank, non_dominated_mask
from isotone.opgfn.policies import GraphPolicy, MLPPolicy, Policy, PolicyOutput, SetPolicy
from isotone.opgfn.replay import ReplayBuffer, ReplayConfig
from isotone.opgfn.sampler import Samples
from isotone.opgfn.volume import hypervolume

__version__ = "0.1.0"
__all__ = [
    "DNA",
    "Bag",
    "BindingTable",
    "Environment",
    "FLSubTB",
    "FragmentEnv",
    "GFlowNet",
    "GraphPolicy",
    "Grid",
    "HyperGrid",
    "MLPPolicy",
    "MOOGrid",
    "Memo",
    "NGrams",
    "NasCell",
    "Objectives",
    "ParetoArchive",
    "Policy",
    "PolicyOutput",
    "ReplayBuffer",
    "ReplayConfig",
    "Samples",
    "SetPolicy",
    "StateGraph",
    "StringEnv",
    "TrainConfig",
    "TrajectoryScores",
    "avg_hausdorff",
    "db_loss",
    "envs",
    "fm_loss",
    "gd_plus",
    "hypervolume",
    "igd_plus",
    "nd_rank",
    "non_dominated_mask",
    "op_db_loss",
    "op_fm_loss",
    "op_subtb_loss",
    "op_tb_loss",
    "order_preserving_loss",
    "pc_entropy",
    "r2",
    "subtb_loss",
    "tanimoto_diversity",
    "tb_loss",
    "top_k_mean",
]
