"""How the programs of the studies are compiled."""

from __future__ import annotations

import functools
import os

import jax

_LEVEL, _EMITTERS = "xla_backend_optimization_level", "xla_cpu_use_fusion_emitters"
_OPTIONS: dict[str, bool | int] = {}
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):  # a level that the user has chosen stands
    _OPTIONS[_LEVEL] = 1
    if jax.__version__.startswith("0.10."):  # later ones do not know it, and refuse it
        _OPTIONS[_EMITTERS] = False

fast_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
"""`jax.jit` at a lower level of the compiler, and on a CPU with its older code for fused loops where there is a choice:
the studies' scans of many small steps are compiled more often than they are run."""
