"""Writing of dense checkpoints: a source's files again, with some tensors replaced.

Files keep the source's names and contents: shards, index, configuration and companions. So
transformers loads the result as it loads the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from spectool.checkpoint.artifact import Content
from spectool.checkpoint.headers import INDEX_SUFFIX, Layout, find_weights
from spectool.checkpoint.tensors import Checkpoint, torch_dtype
from spectool.errors import UnsupportedError

# Files copied with the weights; Python files only if remote code is trusted.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip


def check_dense(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint is not quantized.

    Raises:
        UnsupportedError: it is quantized already.
    """
    quantization = checkpoint.layout.quantization
    if quantization is not None:
        by = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedError(
            f"{checkpoint.path}: is quantized already ({by}); take the dense original instead"
        )


def read_companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Read the files that accompany the weights; Python files too if they are trusted."""
    return {
        str(path.relative_to(checkpoint.path)): path.read_bytes()
        for pattern in ((*COMPANIONS, "*.py") if checkpoint.trust_remote_code else COMPANIONS)
        for path in checkpoint.path.glob(pattern)
        if path.is_file()
    }


def read_small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Read all files of a dense checkpoint but its weights: configuration, index, companions."""
    names, path = ["config.json"], checkpoint.path
    weights = find_weights(path, checkpoint.layout.config)
    if weights.name.endswith(INDEX_SUFFIX):
        names.append(weights.name)
    return read_companions(checkpoint) | {name: (path / name).read_bytes() for name in names}


def replace_tensors(
    layout: Layout, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yield each weight file's name and its tensors, some of them replaced, in stored dtypes."""
    for path in layout.files:
        contents: dict[str, Content] = {}
        for name, entry in layout.tensors.items():
            if entry.path == path:
                contents[name] = entry
                if name in replaced:
                    contents[name] = replaced[name].to(torch_dtype(entry)).contiguous()
        yield path.name, contents
