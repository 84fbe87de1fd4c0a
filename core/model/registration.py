"""spectool's quantizer for transformers; importing this module registers it.

The weights lie in `packed-*.safetensors` on purpose: without `import spectool`, transformers
would skip the unknown quantizer and fill the packed layers with random numbers after a warning.
With these names it finds no weights and fails instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectool.checkpoint.checksums import BackgroundCheck
from spectool.checkpoint.formats import FORMAT_VERSION, packed_entries, upgrade_config
from spectool.checkpoint.headers import PACKED_INDEX, guards_of, read_checksums, read_shards
from spectool.checkpoint.tensors import torch_dtype
from spectool.errors import UnsupportedError
from spectool.model.exchange import field_specs, replace_with_packed
from spectool.model.packed import PackedEmbedding, TensorSpec

if TYPE_CHECKING:
    # Not at run time: transformers.modeling_utils imports the registry, so this module may be
    # imported while that one is.
    from transformers import PreTrainedConfig, PreTrainedModel

QUANT_METHOD = "spectool"

# Extra key of `quantization_config`, set for one load: whether files are compared.
CHECKSUMS = "checksums"


class SpectoolConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact. Unknown keys are kept and saved again."""

    def __init__(
        self,
        *,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        source: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **rest: Any,
    ) -> None:
        stored = {"modules": modules, "format_version": format_version, "source": source, **rest}
        self.modules = packed_entries(stored)
        self.__dict__.update(upgrade_config(stored), source=source or {})
        self.quant_method = quant_method  # type: ignore[assignment]


class SpectoolQuantizer(HfQuantizer):
    """Quantizer that swaps packed linears in, whose fields transformers then loads as buffers."""

    quantization_config: SpectoolConfig
    requires_calibration = True

    def __init__(self, quantization_config: SpectoolConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Removed: an option of this load, not part of the saved configuration.
        self._checksums = quantization_config.__dict__.pop(CHECKSUMS, True)
        self._check: BackgroundCheck | None = None

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # The only hook that gets the configuration before the weight files are looked up.
        config.transformers_weights = PACKED_INDEX
        return config

    # transformers 5.17 has no such hook, and calls this one at that point.
    update_tp_plan = update_attn_implementation

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        # Overridden to do nothing: transformers would unfuse some experts.
        pass

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        headers: dict[str, TensorSpec] = {}
        if files := kwargs.get("checkpoint_files"):
            index = Path(files[0]).with_name(PACKED_INDEX)
            stored = read_checksums(index) if self._checksums else {}
            tensors = read_shards(index, stored).values()
            headers = {entry.name: (torch_dtype(entry), entry.shape) for entry in tensors}
            self._check = BackgroundCheck(guards_of(tensors))
        with torch.device("meta"):
            replace_with_packed(
                model, self.quantization_config.modules, field_specs(headers), dtype=model.dtype
            )

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        del model.config.transformers_weights
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            # transformers takes a model's dtype from its parameters; if norms have no weights and
            # everything else is packed, there are none.
            for part in model.modules():
                if isinstance(part, PackedEmbedding):
                    like = part.like
                    del part.like
                    part.register_parameter("like", nn.Parameter(like, requires_grad=False))
        if self._check is not None:
            self._check.finish()
            # Its threads could not be copied with the model.
            self._check = None
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        raise UnsupportedError(
            "a packed model is not saved again by save_pretrained",
            hint="copy the artifact's directory; it is the saved model",
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(SpectoolConfig)
    register_quantizer(QUANT_METHOD)(SpectoolQuantizer)
