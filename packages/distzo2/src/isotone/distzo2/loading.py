"""Models out of Hugging Face folders, and what is said of a folder that holds none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isotone.shared.errors import InputError

_ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """The causal or classification model in `folder`, as its config says, in eval mode; with an adapter of peft where
    `folder` holds one, which alone is trainable then.

    Raises `InputError` where there is none, where weights are missing or where one is NaN.
    """
    if (folder / _ADAPTER).is_file():
        return _with_adapter(folder, dtype)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    # its own bars and remarks would stand between ours
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = config_of(folder)
    names = getattr(config, "architectures", None) or [""]
    classifier = names[0].endswith("ForSequenceClassification")
    loader: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with reading(folder):
        model, report = loader.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"expected every weight of the model in {str(folder)!r}, {missing[0]} is missing")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")
    return model.eval()


def _with_adapter(folder: Path, dtype: str | torch.dtype) -> Any:
    """The model that an adapter's config names, with the adapter."""
    try:
        import peft
    except ImportError:
        raise InputError(f"expected peft for the adapter in {str(folder)!r}: install isotone-distzo2[peft]") from None
    with reading(folder):
        base = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base or not Path(base).is_dir():
        raise InputError(f"expected the adapter's base model at {base!r}, named in {str(folder / _ADAPTER)!r}")
    model = load_model(Path(base), dtype)
    with reading(folder):
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()


def config_of(folder: Path) -> Any:
    """The config of the model in `folder`. Raises `InputError` where there is none."""
    from transformers import AutoConfig

    inside = folder / "config.json" if folder.is_dir() else folder
    if not inside.is_file():
        raise InputError(f"expected a Hugging Face model folder with a config.json at {str(folder)!r}, found none")
    with reading(folder):
        return AutoConfig.from_pretrained(folder)


def meta_model(folder: Path) -> Any:
    """The model of a config without its weights: on the meta device."""
    from transformers import AutoModelForCausalLM

    config = config_of(folder)
    with reading(folder), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def save_model(model: Any, state: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    """Write a model in Hugging Face's format with the tokenizer of `source`: whole, or not at all."""
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        model.save_pretrained(work, state_dict=state)
        for pattern in _TOKENIZER:
            for path in source.glob(pattern):
                shutil.copy(path, work / path.name)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Errors that a broken model folder causes, as one sentence that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"expected a whole Hugging Face model in {str(folder)!r}: {first}") from None
