"""From a float model to a quantised one: the whole pipeline (section 2, "Algorithm listing (quantize)")."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotone.quamba2.calibrate import samples_of
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.layout import tensors_of
from isotone.quamba2.loading import load
from isotone.quamba2.modeling import QuambaForCausalLM
from isotone.quamba2.plain import PlainConfig
from isotone.quamba2.prepare import Prepared, Progress, prepare
from isotone.shared.errors import InputError

LOW_SQNR = 10.0  # decibels


def quantize(
    model: Any,
    calibration: Iterable[Any] | None = None,
    config: QuambaConfig | None = None,
    *,
    folder: str | Path | None = None,
    in_place: bool = False,
    held_out: Any = None,
    on_progress: Progress | None = None,
) -> QuambaForCausalLM:
    """Quantise `model`: a Hugging Face Mamba or Mamba2, or a folder of one, or of a mamba_ssm checkpoint.

    `calibration`: samples of token ids, each (l,), a list, or (b, l); None where no step needs any (W4A16, no GPTQ).
    `folder`: where calibration keeps the checkpoints it resumes from. `in_place`: change the float model rather than a
    copy of it. `held_out` (l,) or (b, l): a sample on which each block is compared with the float model; a block under
    10 dB gives a warning (step 7). `on_progress(step, done, total)`. The result is on the model's device. Raises
    `InputError` on a model, samples or options that can not be used.
    """
    config = config or QuambaConfig()
    if in_place and held_out is not None:
        raise InputError("expected in_place=False where a held-out sample is compared with the float model")
    source = load(model)
    made = build(prepare(source, calibration, config, folder, in_place, on_progress))
    made.to(source.lm_head.weight.device)
    if held_out is not None:
        from isotone.quamba2.report import block_sqnr

        ids = samples_of([held_out], config.calib_samples, config.calib_len, made.arch.vocab)[0]
        for number, decibels in enumerate(block_sqnr(made, source, ids)):
            if decibels < LOW_SQNR:
                warnings.warn(f"block {number} keeps {decibels:.1f} dB of the float model's output", stacklevel=2)
    return made


def build(prepared: Prepared) -> QuambaForCausalLM:
    """The quantised model of `prepared`, on the CPU."""
    config: Any = prepared.model.config
    source = config.hugging_face() if isinstance(config, PlainConfig) else copy.deepcopy(config)
    return QuambaForCausalLM(source, prepared.config, tensors_of(prepared))
