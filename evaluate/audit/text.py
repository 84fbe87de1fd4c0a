"""The text that audits run on."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.data.template import encode
from spectool.data.text import MIXED, builtin_text, read_text
from spectool.evaluate.audit.options import AuditTextOptions
from spectool.report import Reporter


def read_ids(
    options: AuditTextOptions, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> list[int]:
    """Return the tokens of the texts that the options name, or of the built-in text."""
    if options.text:
        text = read_text(
            options.text,
            tokenizer,
            field=options.field,
            template=options.template or None,
            max_characters=options.limit,
            reporter=reporter,
        )
    else:
        text = builtin_text(MIXED)
    return encode(tokenizer, text[: options.limit])
