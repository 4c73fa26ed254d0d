"""Quamba2: Mamba and Mamba2 in 8 and 4 bits, states and embeddings too, by sorted and clustered channels.

`quantize` makes a `QuambaForCausalLM` of a Hugging Face model, `fake_quantize` a simulation of it with every switch.
"""

from isotone.quamba2.calibrate import calibrate
from isotone.quamba2.clustering import Plan, sort_and_cluster
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.decode import Decoder
from isotone.quamba2.evaluate import evaluate
from isotone.quamba2.fake import FakeQuamba, fake_quantize
from isotone.quamba2.gptq import GPTQ
from isotone.quamba2.hadamard import hadamard_transform
from isotone.quamba2.modeling import QuambaForCausalLM
from isotone.quamba2.packing import pack_int4, unpack_int4
from isotone.quamba2.quantize import quantize
from isotone.quamba2.reorder import reorder
from isotone.quamba2.report import report
from isotone.quamba2.rotate import apply_hadamard
from isotone.quamba2.search import search_mixed_precision
from isotone.quamba2.ssd import selective_scan, ssd_chunk_scan, ssd_step

__version__ = "0.1.0"
__all__ = [
    "GPTQ",
    "Decoder",
    "FakeQuamba",
    "Plan",
    "QuambaConfig",
    "QuambaForCausalLM",
    "apply_hadamard",
    "calibrate",
    "evaluate",
    "fake_quantize",
    "hadamard_transform",
    "pack_int4",
    "quantize",
    "reorder",
    "report",
    "search_mixed_precision",
    "selective_scan",
    "sort_and_cluster",
    "ssd_chunk_scan",
    "ssd_step",
    "unpack_int4",
]
