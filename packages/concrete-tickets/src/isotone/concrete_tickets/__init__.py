"""Concrete Ticket Search: winning tickets near initialisation by a relaxed search over masks.

A logit on every prunable weight, masks drawn from the binary Concrete distribution, the sparse network's outputs held
to the dense one's at frozen weights, the density by GRADBALANCE, and in the end the exact top k. With the baselines
that it is measured against: LTR, IMP, magnitude, random, ERK, SNIP, GraSP, SynFlow, gradual pruning.
"""

from isotone.concrete_tickets.adapters import from_linen, from_nnx
from isotone.concrete_tickets.baselines import (
    balanced_batch,
    erk,
    grasp,
    magnitude,
    random_ticket,
    saliency,
    snip,
    synflow,
)
from isotone.concrete_tickets.batches import accuracy
from isotone.concrete_tickets.controllers import grad_balance, lagrangian
from isotone.concrete_tickets.images import Images, load_images
from isotone.concrete_tickets.layout import default_kernels, prunable
from isotone.concrete_tickets.lottery import gradual_magnitude, imp
from isotone.concrete_tickets.models import Model, make_model
from isotone.concrete_tickets.objectives import OBJECTIVES, tempered_kl
from isotone.concrete_tickets.optimizer import mask_optimizer, masked_apply
from isotone.concrete_tickets.sanity import SanityReport, sanity_check
from isotone.concrete_tickets.search import SearchConfig, SearchResult, search
from isotone.concrete_tickets.ticket import LayerCollapse, Ticket
from isotone.concrete_tickets.torch_masks import from_torch, prune_torch
from isotone.concrete_tickets.training import Recipe, Trained, Trainer, train

__version__ = "0.1.0"
__all__ = [
    "search",
    "SearchConfig",
    "SearchResult",
    "Ticket",
    "LayerCollapse",
    "prunable",
    "default_kernels",
    "OBJECTIVES",
    "tempered_kl",
    "grad_balance",
    "lagrangian",
    "mask_optimizer",
    "masked_apply",
    "snip",
    "grasp",
    "synflow",
    "saliency",
    "magnitude",
    "random_ticket",
    "erk",
    "balanced_batch",
    "imp",
    "gradual_magnitude",
    "sanity_check",
    "SanityReport",
    "Recipe",
    "Trainer",
    "Trained",
    "train",
    "accuracy",
    "from_nnx",
    "from_linen",
    "from_torch",
    "prune_torch",
    "make_model",
    "Model",
    "load_images",
    "Images",
]
