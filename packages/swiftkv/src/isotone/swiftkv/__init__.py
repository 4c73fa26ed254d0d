"""SwiftKV: prefill that stops half way through the layers, on Hugging Face models.

`convert` makes a swift model of a Llama, Mistral, Qwen2, Qwen3 or DeepSeek-V2: the keys and values of its upper layers
come from the input of the first of them (SingleInputKV), shared by groups of layers (AcrossKV). `distill` restores what
that cost, against the model itself. `generate` skips: prompt tokens run the lower layers alone.
"""

from isotone.swiftkv.accounting import decode_flops, flops, kv_bytes, speedup_bound
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.choose import Suggestion, suggest_l
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.convert import convert, drop_teacher, freeze, teacher_of
from isotone.swiftkv.data import Batch, Windows, pack, recall_task
from isotone.swiftkv.distill import DistillConfig, History, distill
from isotone.swiftkv.engine import decode, extend, make_cache, prefill
from isotone.swiftkv.evaluate import cached_logits, fidelity, recall_accuracy, student_logits, teacher_logits
from isotone.swiftkv.export import export_arctic
from isotone.swiftkv.loading import SwiftKVForCausalLM, load
from isotone.swiftkv.losses import distillation_kl, tiled_kl
from isotone.swiftkv.profiling import BenchmarkPoint, benchmark

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "BenchmarkPoint",
    "DistillConfig",
    "History",
    "Suggestion",
    "SwiftKVCache",
    "SwiftKVConfig",
    "SwiftKVForCausalLM",
    "Windows",
    "benchmark",
    "cached_logits",
    "convert",
    "decode",
    "decode_flops",
    "distill",
    "distillation_kl",
    "drop_teacher",
    "export_arctic",
    "extend",
    "fidelity",
    "flops",
    "freeze",
    "kv_bytes",
    "load",
    "make_cache",
    "pack",
    "prefill",
    "recall_accuracy",
    "recall_task",
    "speedup_bound",
    "student_logits",
    "suggest_l",
    "teacher_logits",
    "teacher_of",
    "tiled_kl",
]
