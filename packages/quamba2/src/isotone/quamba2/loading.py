"""Float models to quantise: Hugging Face models and folders, and checkpoints of mamba_ssm.

A mamba_ssm checkpoint (config.json with d_model and ssm_cfg, and its state dict) becomes the Hugging Face model with
the same weights; the state dict is read as safetensors, or by torch.load with weights_only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isotone.quamba2.architecture import check_kind
from isotone.shared.errors import InputError


def check_finite(model: Any) -> None:
    """Raise `InputError` where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")


def load(model: Any) -> Any:
    """A Hugging Face Mamba or Mamba2 in eval mode: `model` itself, or out of a folder, or by its name on the hub.

    Raises `InputError` on a model of another kind, a hybrid, one that is quantised already, and a broken folder.
    """
    if isinstance(model, nn.Module):
        if type(model).__name__ == "QuambaForCausalLM":
            raise InputError("expected a float model, got one that is quantised already")
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "lm_head"):
            raise InputError(f"expected a Mamba or Mamba2 with a language model's head, got {type(model).__name__}")
        check_kind(config)
        return model.eval()
    folder = Path(model)
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise InputError(f"expected a model folder, or a name on the hub such as ORGANISATION/NAME, got {str(model)!r}")
    document = read_config(folder) if folder.exists() else None
    if document is not None and "d_model" in document:
        return from_mamba_ssm(document, _state_dict(folder))
    return _hugging_face(model, document)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in `folder`. Raises `InputError` where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"expected a model folder with a config.json at {str(folder)!r}, found none")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError):
        raise InputError(f"expected JSON in {str(path)!r}") from None
    if not isinstance(document, dict):
        raise InputError(f"expected a JSON object in {str(path)!r}")
    return document


def _hugging_face(name: Any, document: dict[str, Any] | None) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if document is not None and document.get("quantization_config"):
            raise InputError(f"expected a float model in {str(name)!r}, got one that is quantised already")
        config = AutoConfig.from_pretrained(name)
        check_kind(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, config=config, output_loading_info=True)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a whole Hugging Face model at {str(name)!r}: {first}") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"expected every weight of the model in {str(name)!r}, {missing[0]} is missing")
    return model.eval()


def _state_dict(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if tensors.is_file():
            return load_file(tensors)
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a torn file makes of the restricted unpickler
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a whole checkpoint in {str(folder)!r}: {first}") from None
    raise InputError(f"expected model.safetensors or pytorch_model.bin in {str(folder)!r}, found none")


def from_mamba_ssm(document: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The Hugging Face model of a mamba_ssm config and state dict (section 5, "mamba_ssm naming").

    D with a number a channel is kept as it is: this package computes with it, transformers does not. Raises
    `InputError` on hybrids with attention, blocks with an MLP, LayerNorm, and weights that are missing or misshapen.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    options = dict(document.get("ssm_cfg") or {})
    kind = str(options.pop("layer", "Mamba1"))
    if document.get("attn_layer_idx"):
        raise InputError("expected a model of Mamba blocks alone, got a hybrid with attention")
    if document.get("d_intermediate"):
        raise InputError(f"expected blocks without an MLP, got d_intermediate {document['d_intermediate']}")
    if kind not in ("Mamba1", "Mamba2") or not document.get("rms_norm", True):
        raise InputError(f"expected Mamba1 or Mamba2 with RMSNorm, got {kind}, rms_norm {document.get('rms_norm')}")
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): value for name, value in state.items()}
    embedding = weights.get("backbone.embeddings.weight")
    if embedding is None:
        raise InputError("expected backbone.embedding.weight in the checkpoint, it is missing")
    width, expand = int(document["d_model"]), options.get("expand", 2)
    sizes: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": int(document["n_layer"]),
        "expand": expand,
        "conv_kernel": options.get("d_conv", 4),
        "use_bias": options.get("bias", False),
        "use_conv_bias": options.get("conv_bias", True),
        "tie_word_embeddings": document.get("tie_embeddings", True),
        "residual_in_fp32": document.get("residual_in_fp32", True),
    }
    model: Any
    if kind == "Mamba2":
        head = options.get("headdim", 64)
        limit: dict[str, Any] = {"time_step_limit": tuple(options["dt_limit"])} if "dt_limit" in options else {}
        model = Mamba2ForCausalLM(
            Mamba2Config(
                **sizes,
                **limit,
                head_dim=head,
                num_heads=width * expand // head,
                n_groups=options.get("ngroups", 1),
                state_size=options.get("d_state", 128),
                chunk_size=options.get("chunk_size", 256),
            )
        )
    else:
        rank = {"time_step_rank": options["dt_rank"]} if isinstance(options.get("dt_rank"), int) else {}
        model = MambaForCausalLM(MambaConfig(**sizes, **rank, state_size=options.get("d_state", 16)))
    if sizes["tie_word_embeddings"]:
        weights.setdefault("lm_head.weight", embedding)
    for number, layer in enumerate(model.backbone.layers):
        skip = weights.get(f"backbone.layers.{number}.mixer.D")
        if skip is not None and skip.shape != layer.mixer.D.shape and skip.numel() == width * expand:
            layer.mixer.D = nn.Parameter(skip.detach().clone().flatten())
            weights[f"backbone.layers.{number}.mixer.D"] = skip.flatten()
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(f"expected the weights that the config asks for: {first}") from None
    check_finite(model)
    return model.eval()
