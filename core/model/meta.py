"""Configurations of checkpoints, and their models on the meta device."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from spectool.checkpoint import foreign
from spectool.checkpoint.dtypes import with_plain_dtypes
from spectool.checkpoint.tensors import Checkpoint
from spectool.errors import UnsupportedError, wrap_errors


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Make the configuration of a checkpoint.

    Raises:
        UnsupportedError: transformers does not know the model type.
        CheckpointError: the configuration contradicts itself.
    """
    path, raw, trusted = checkpoint.path, checkpoint.layout.config, checkpoint.trust_remote_code
    with wrap_errors(path, "its config.json is not valid"):
        plain = with_plain_dtypes(raw, path)
        try:
            if plain == raw and not checkpoint.layout.is_part:
                return _load_config(path, trusted)
            return _make_config(plain, path, trusted)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            is_remote = "trust_remote_code" in str(error)
            if not is_remote and raw.get("model_type") in CONFIG_MAPPING:
                raise
            hint = "--trust-remote-code runs the code in it" if is_remote else None
            raise UnsupportedError(f"{path}: unknown architecture: {reason}", hint=hint) from error


def _load_config(path: Path, trusted: bool) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    return config


def _make_config(raw: Mapping[str, Any], path: Path, trusted: bool) -> PreTrainedConfig:
    """Make a configuration of the JSON object `raw`, as if it were read from `path`."""
    remote = raw.get("auto_map")
    if isinstance(remote, dict):
        # The remote code is still loaded from `path`.
        local = {key: f"{path}--{value}" for key, value in remote.items() if "--" not in value}
        raw = {**raw, "auto_map": {**remote, **local}}
    with tempfile.TemporaryDirectory(prefix="spectool-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        config = _load_config(file, trusted)
    config._name_or_path = str(path)
    return config


def model_class(config: PreTrainedConfig, *, seq2seq: bool = False) -> Any:
    """Return transformers' auto class for this configuration: causal, else image-text-to-text.

    With `seq2seq`, an encoder-decoder that can be decoded has its own.

    Raises:
        UnsupportedError: no class supports it, or it is another encoder-decoder.
    """
    foreign.check_encoder_decoder(config, config.model_type, "", seq2seq=seq2seq)
    if foreign.is_encoder_decoder(config):
        return transformers.AutoModelForSeq2SeqLM
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    raise UnsupportedError(f"{config.model_type}: transformers has no causal model for it")


def build_meta(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    seq2seq: bool = False,
) -> PreTrainedModel:
    """Build the whole model on the meta device, in eval mode, to run in `dtype`.

    `seq2seq` is as in `model_class`.

    Raises:
        InputError: as `model_class`, or no model can be built of this configuration.
    """
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    kind = model_class(config, seq2seq=seq2seq)
    where = config._name_or_path or config.model_type
    with wrap_errors(where, "no model can be built of its config.json"):
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(
                dense, dtype=dtype, trust_remote_code=trust_remote_code
            )
        # Fused expert kernels do not expose the inputs of each expert; the eager loop does.
        model.set_experts_implementation("eager")
    model.train(False)
    return model
