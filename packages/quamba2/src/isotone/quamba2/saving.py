"""A quantised model on the disk: model.safetensors with the tensors of `layout`, and config.json.

config.json is the Hugging Face config of the float model with a `quantization_config` of this package's options, so
that other programs see what it is. Nothing is rounded again on the way.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.layout import expected
from isotone.quamba2.loading import read_config
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

METHOD = "quamba2"


def save(model: Any, folder: str | Path) -> Path:
    """Write `model`, a `QuambaForCausalLM`, into `folder`, its precision as it is set now; returns the folder."""
    import safetensors.torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = model.config.to_dict()
    if model.config.a_bits == "mixed":
        options["a16_blocks"] = [number for number, bits in enumerate(model.block_bits) if bits == 16]
    tensors = {name: values.to("cpu").contiguous() for name, values in model.tensors().items()}
    # as transformers writes it: infinities in a form that every reader takes
    document = json.loads(model.source.to_json_string(use_diff=False))
    document |= {"architectures": ["QuambaForCausalLM"], "quantization_config": {"quant_method": METHOD, **options}}
    atomic_write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    atomic_write(folder / "config.json", (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
    return folder


def read(folder: str | Path) -> tuple[Any, QuambaConfig, dict[str, Tensor]]:
    """What `QuambaForCausalLM` is made of, out of a folder that `save` wrote.

    Raises `InputError` where there is none, another package's, a torn file, or tensors that the options do not ask for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    facts = read_config(folder).get("quantization_config")
    if not isinstance(facts, dict) or facts.get("quant_method") != METHOD:
        raise InputError(f"expected a model that this package quantised in {str(folder)!r}, got another; quantize it")
    options = {key: value for key, value in facts.items() if key != "quant_method"}
    try:
        config = QuambaConfig.from_dict(options)
    except TypeError as error:
        raise InputError(f"expected options of QuambaConfig in {str(folder)!r}: {error}") from None
    source = _source(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected a whole model.safetensors in {str(folder)!r}: {error}") from None
    _check(tensors, source, config, folder)
    return source, config, tensors


def _source(folder: Path) -> Any:
    """The float model's config."""
    try:
        source: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a whole config.json in {str(folder)!r}: {first}") from None
    del source.quantization_config
    return source


def _check(tensors: dict[str, Tensor], source: Any, config: QuambaConfig, folder: Path) -> None:
    d_size = next((v.numel() for name, v in tensors.items() if name in ("blocks.0.D", "blocks.0.D_codes")), 0)
    wanted = expected(Architecture.of(source), config, source.use_bias, source.use_conv_bias, d_size)
    if missing := sorted(set(wanted) - set(tensors)):
        raise InputError(f"expected every tensor of the model in {str(folder)!r}, {missing[0]} is missing")
    if strange := sorted(set(tensors) - set(wanted)):
        raise InputError(f"expected the tensors that the config in {str(folder)!r} asks for, got {strange[0]} too")
    for name, (shape, dtype) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise InputError(
                f"expected {name} of shape {shape} and {dtype} in {str(folder)!r}, got {tuple(found.shape)} and "
                f"{found.dtype}"
            )
