"""The table of methods. Targets are resolved on first use, never on import.

A target is `module:Class`, or `module:function` for a verifier; its file holds the whole method.
To add a method: its file, its test of the same name, its row here. tests/core/test_methods.py
checks every row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from spectool.errors import UsageError, nearest

Kind = Literal[
    "quantizer",
    "lm_head",
    "chooser",
    "drafter",
    "head",
    "verifier",
    "kv",
    "strategy",
    "measure",
    "objective",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method: its target, its line in lists and reference pages, and the paper it comes from.

    A method of kind `lm_head` fits an lm_head and is a quantizer too; a chooser picks a quantizer.
    A method of kind `head` trains a head that drafts nothing itself.
    """

    kind: Kind
    target: str
    summary: str
    source: str
    # "research": not recommended as a first choice.
    status: Literal["stable", "research"] = "stable"
    # Other programs that run its artifacts, besides transformers for packed checkpoints.
    also_in: tuple[str, ...] = ()
    # A drafter with draft heads, which `train-heads` trains.
    trainable: bool = False

    @property
    def runs_in(self) -> tuple[str, ...]:
        """The programs that run artifacts of the method."""
        packed = self.serves_as("quantizer")
        return ("spectool", *(("transformers",) if packed else ()), *self.also_in)

    def serves_as(self, kind: Kind) -> bool:
        """Return whether a method of this kind can be had by this name."""
        return kind == self.kind or (kind, self.kind) == ("quantizer", "lm_head")


# A key is a method's name, with its kind in front (`kv:int8`) where another kind has that name.
METHODS: dict[str, Method] = {
    "rtn": Method(
        kind="quantizer",
        target="spectool.quantize.methods.rtn:RTN",
        summary="Round to nearest on a uniform grid, 2-8 bits, in groups along the input",
        source="folklore; the baseline of every quantization paper",
    ),
    "nf4": Method(
        kind="quantizer",
        target="spectool.quantize.methods.nf4:NF4",
        summary="4-bit normal-quantile codes in blocks, computed by bitsandbytes",
        source="Dettmers et al., QLoRA, 2023 (arXiv:2305.14314)",
    ),
    "int8": Method(
        kind="quantizer",
        target="spectool.quantize.methods.int8:Int8",
        summary="8-bit codes with one scale per row: the weights of LLM.int8()",
        source="Dettmers et al., LLM.int8(), 2022 (arXiv:2208.07339)",
    ),
    "ptq161": Method(
        kind="quantizer",
        target="spectool.quantize.methods.ptq161:PTQ161",
        summary="A fifth of the columns at 4 bits, signs with fitted scales for the rest: 1.6 bits",
        source="Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179)",
    ),
    "gptq": Method(
        kind="quantizer",
        target="spectool.quantize.methods.gptq:GPTQ",
        summary="The grid of rtn; each column's rounding error is compensated by later columns",
        source="Frantar et al., GPTQ, 2022 (arXiv:2210.17323)",
    ),
    "hqq": Method(
        kind="quantizer",
        target="spectool.quantize.methods.hqq:HQQ",
        summary="A grid whose zero points leave few large errors; no calibration",
        source="Badri and Shaji, HQQ, 2023 (mobiusml.github.io/hqq_blog)",
    ),
    "olive": Method(
        kind="quantizer",
        target="spectool.quantize.methods.olive:OliVe",
        summary="4 or 8 bits; an outlier takes the place of its neighbour, which becomes zero",
        source="Guo et al., OliVe, 2023 (arXiv:2304.07493)",
    ),
    "olive-activations": Method(
        kind="quantizer",
        target="spectool.quantize.methods.olive:OliVeActivations",
        summary="OliVe with inputs rounded too, decoded before the product: a study of accuracy",
        source="Guo et al., OliVe, 2023 (arXiv:2304.07493)",
        status="research",
    ),
    "jlcm": Method(
        kind="quantizer",
        target="spectool.quantize.methods.jlcm:JLCM",
        summary="Codebooks for groups of rows, fitted together with the codes; 1 to 4 bits",
        source="Yvinec et al., JLCM, 2023 (arXiv:2309.17361); details are ours",
    ),
    "scalar": Method(
        kind="quantizer",
        target="spectool.quantize.methods.scalar:Scalar",
        summary="A codebook per input and bits where they count; 1 to 4 bits on average",
        source="codebooks of Hsu et al., QLAE, 2023 (arXiv:2305.18378); for weights they are ours",
        status="research",
    ),
    "vq": Method(
        kind="lm_head",
        target="spectool.quantize.lm_head.vq:VQ",
        summary="Rows share vectors of a codebook; for the lm_head, trained by --lm-head vq",
        source="VQ-Logits, 2025 (arXiv:2505.10202); Zhu et al., SimVQ, 2024 (arXiv:2411.02038)",
        status="research",
    ),
    "auto": Method(
        kind="chooser",
        target="spectool.quantize.auto:Auto",
        summary="Pick a quantizer for a size or a number of bits, and report why",
        source="the order that benchmarks/fidelity.py found",
    ),
    "lora": Method(
        kind="objective",
        target="spectool.distill.objectives.lora:LoRA",
        summary="Low-rank updates of the linear layers, merged into the weights",
        source="Hu et al., LoRA, 2021 (arXiv:2106.09685), by peft",
        also_in=("transformers", "vllm", "sglang"),
    ),
    "logits": Method(
        kind="objective",
        target="spectool.distill.objectives.logits:Logits",
        summary="All weights, or the fields of packed ones, learn a teacher's probabilities",
        source="Hinton et al., 2015 (arXiv:1503.02531)",
        also_in=("transformers", "vllm", "sglang"),
    ),
    "consistency": Method(
        kind="objective",
        target="spectool.distill.objectives.consistency:Consistency",
        summary="The model learns to guess its own text ahead, for `--draft jacobi`",
        source="Kou et al., CLLM, 2024 (arXiv:2403.00835); Hu et al., Jacobi Forcing, 2025 "
        "(arXiv:2512.14681)",
        also_in=("transformers", "vllm", "sglang"),
    ),
    "sorted": Method(
        kind="objective",
        target="spectool.distill.objectives.sorted:Sorted",
        summary="The first layers of a model become a draft model, with exits between them",
        source="Kavehzadeh et al., S2D, 2024 (arXiv:2407.01955)",
        status="research",
        also_in=("transformers", "vllm", "sglang"),
    ),
    "lexical-units": Method(
        kind="objective",
        target="spectool.distill.objectives.lexical_units:LexicalUnits",
        summary="The model learns to guess several tokens where it is sure, for `--draft units`",
        source="Sun et al., Lexical Unit Decoding, 2024 (arXiv:2405.15208)",
        status="research",
        also_in=("transformers", "vllm", "sglang"),
    ),
    "cross": Method(
        kind="objective",
        target="spectool.distill.objectives.cross:Cross",
        summary="A small encoder-decoder learns from MODEL, for `--draft copy` and short outputs",
        source="Elfeki et al., Return of the Encoder, 2025 (arXiv:2501.16273)",
        status="research",
        also_in=("transformers",),
    ),
    "none": Method(
        kind="drafter",
        target="spectool.decode.drafters.none:NoDrafter",
        summary="Plain decoding, one token per forward",
        source="the baseline",
    ),
    "ngram": Method(
        kind="drafter",
        target="spectool.decode.drafters.ngram:NgramDrafter",
        summary="Draft what followed the longest matching n-gram of the text (prompt lookup)",
        source="Saxena, Prompt Lookup Decoding, 2023",
    ),
    "copy": Method(
        kind="drafter",
        target="spectool.decode.drafters.copy:CopyDrafter",
        summary="Draft the rest of the source from where the output stands in it; for corrections",
        source="Sun et al., Aggressive Decoding, 2021 (arXiv:2106.04970)",
    ),
    "recycle": Method(
        kind="drafter",
        target="spectool.decode.drafters.recycle:RecycleDrafter",
        summary="Draft the target's last top tokens after each token; a static tree",
        source="Luo et al., Token Recycling, 2024 (arXiv:2408.08696)",
    ),
    "trigram": Method(
        kind="drafter",
        target="spectool.decode.drafters.trigram:TrigramDrafter",
        summary="A table of trigrams counted in the text; the most probable tree by their scores",
        source="Liu et al., ADED, 2024 (arXiv:2406.18200)",
    ),
    "jacobi": Method(
        kind="drafter",
        target="spectool.decode.drafters.jacobi:JacobiDrafter",
        summary="Draft the target's predictions for the previous draft window (Jacobi iteration)",
        source="Teng et al., Speculative Jacobi Decoding, 2024 (arXiv:2410.01699)",
        status="research",
    ),
    "units": Method(
        kind="drafter",
        target="spectool.decode.drafters.units:UnitsDrafter",
        summary="Draft what placeholders after the last token guess, for `distill lexical-units`",
        source="Sun et al., Lexical Unit Decoding, 2024 (arXiv:2405.15208)",
        status="research",
    ),
    "skip": Method(
        kind="drafter",
        target="spectool.decode.drafters.skip:SkipDrafter",
        summary="Draft with the model itself without some layers, chosen while it runs",
        source="Xia et al., SWIFT, 2024 (arXiv:2410.06916)",
        status="research",
    ),
    "draft_model": Method(
        kind="drafter",
        target="spectool.decode.drafters.draft_model:DraftModelDrafter",
        summary="A smaller checkpoint with the same tokenizer proposes a chain or a tree",
        source="Leviathan et al., 2023 (arXiv:2211.17192); Chen et al., 2023 (arXiv:2302.01318); "
        "Jeon et al., 2024 (arXiv:2402.14160)",
    ),
    "medusa": Method(
        kind="drafter",
        target="spectool.decode.drafters.medusa:MedusaDrafter",
        summary="Trained heads predict several tokens ahead at once; a static tree",
        source="Cai et al., Medusa, 2024 (arXiv:2401.10774), Medusa-1",
        also_in=("vllm",),
        trainable=True,
    ),
    "hydra": Method(
        kind="drafter",
        target="spectool.decode.drafters.hydra:HydraDrafter",
        summary="Heads that also see the tokens drafted before theirs; a static tree",
        source="Ankner et al., Hydra and Hydra++, 2024 (arXiv:2402.05109)",
        trainable=True,
    ),
    "eagle3": Method(
        kind="drafter",
        target="spectool.decode.drafters.eagle3:Eagle3Drafter",
        summary="A trained layer over hidden states of three target layers; a dynamic tree",
        source="Li et al., EAGLE-3, 2025 (arXiv:2503.01840); tree of EAGLE-2 (arXiv:2406.16858)",
        also_in=("vllm", "sglang"),
        trainable=True,
    ),
    "clover": Method(
        kind="drafter",
        target="spectool.decode.drafters.clover:CloverDrafter",
        summary="Two layers over the text, then a recurrent state per drafted token; a static tree",
        source="Xiao et al., Clover-2, 2024 (arXiv:2408.00264)",
        status="research",
        trainable=True,
    ),
    "chimera": Method(
        kind="drafter",
        target="spectool.decode.drafters.chimera:ChimeraDrafter",
        summary="Trigrams of drafted tokens attend to the target's states; a static tree",
        source="Zeng et al., Chimera, 2024 (arXiv:2402.15758)",
        status="research",
        trainable=True,
    ),
    "ppd": Method(
        kind="drafter",
        target="spectool.decode.drafters.ppd:PPDDrafter",
        summary="Trained prompt tokens in the target's forward predict the next draft tree",
        source="Chen et al., Parallel Prompt Decoding, 2024 (arXiv:2405.18628)",
        status="research",
        trainable=True,
    ),
    "hidden-transfer": Method(
        kind="drafter",
        target="spectool.decode.drafters.hidden_transfer:HiddenTransferDrafter",
        summary="Trained matrices predict later tokens' middle states in the target's forward",
        source="Wu et al., Hidden Transfer, 2024 (arXiv:2404.12022)",
        status="research",
        trainable=True,
    ),
    "acceptance": Method(
        kind="head",
        target="spectool.decode.heads.acceptance:AcceptanceHead",
        summary="A head on a draft model ends its chains where a rejection is likely",
        source="Huang et al., SpecDec++, 2024 (arXiv:2405.19715)",
        status="research",
    ),
    "judge": Method(
        kind="head",
        target="spectool.decode.heads.judge:JudgeHead",
        summary="A head accepts drafted tokens that leave the answer as it is; lossy",
        source="Bachmann et al., Judge Decoding, 2025 (arXiv:2501.19309); Garipov et al., "
        "AutoJudge, 2025 (arXiv:2504.20039)",
        status="research",
    ),
    "greedy": Method(
        kind="verifier",
        target="spectool.decode.verify:greedy",
        summary="Accept the child equal to the target's most likely token; exact for any draft",
        source="Stern et al., 2018 (arXiv:1811.03115)",
    ),
    "token-match": Method(
        kind="verifier",
        target="spectool.decode.verify:token_match",
        summary="Sample the target's token once per node and accept the child equal to it; exact",
        source="Miao et al., SpecInfer, 2023 (arXiv:2305.09781), naive sampling",
    ),
    "rejection": Method(
        kind="verifier",
        target="spectool.decode.verify:rejection",
        summary="Accept with min(1, p/q), siblings against the residual, else sample from it",
        source="Leviathan et al., 2023 (arXiv:2211.17192); Chen et al., 2023 (arXiv:2302.01318); "
        "Jeon et al., 2024 (arXiv:2402.14160)",
    ),
    "k-seq": Method(
        kind="verifier",
        target="spectool.decode.verify:k_seq",
        summary="Accept independent drafts with min(1, p / (rho q)), rho chosen for their number",
        source="Sun et al., SpecTr, 2023 (arXiv:2310.15141)",
    ),
    "typical": Method(
        kind="verifier",
        target="spectool.decode.verify:typical",
        summary="Accept tokens of enough probability; changes the distribution, needs --lossy",
        source="Cai et al., Medusa, 2024 (arXiv:2401.10774)",
    ),
    "dense": Method(
        kind="kv",
        target="spectool.decode.kv.dense:DenseStore",
        summary="Keys and values as the model computes them, in its dtype",
        source="the baseline",
    ),
    "kv:int8": Method(
        kind="kv",
        target="spectool.decode.kv.int8:Int8Store",
        summary="8-bit codes of keys and values: scales per group of a key, and per value",
        source="the asymmetry of keys and values: Hooper et al., KVQuant, 2024 (arXiv:2401.18079)",
    ),
    "entropy": Method(
        kind="strategy",
        target="spectool.decode.target.entropy:EntropyTarget",
        summary="Two models take turns by the mean entropy of the last predictions; lossy",
        source="Simonds, Entropy Adaptive Decoding, 2025 (arXiv:2502.06833)",
        status="research",
    ),
    "perplexity": Method(
        kind="measure",
        target="spectool.evaluate.measures.perplexity:Perplexity",
        summary="exp of the mean negative log-likelihood of a text's tokens",
        source="Jelinek et al., 1977",
    ),
    "divergence": Method(
        kind="measure",
        target="spectool.evaluate.measures.divergence:Divergence",
        summary="KL divergence from a reference, and how often both prefer the same token",
        source="Kullback and Leibler, 1951",
    ),
    "layers": Method(
        kind="measure",
        target="spectool.evaluate.measures.layers:Layers",
        summary="Relative squared error of each packed matrix",
        source="folklore",
    ),
    "decoder_layers": Method(
        kind="measure",
        target="spectool.evaluate.measures.decoder_layers:DecoderLayers",
        summary="Hidden states, attention and gates layer by layer, and the layer that adds most "
        "error",
        source="attention entropy: Jha and Reagen, 2025 (arXiv:2501.03489); gates: He et al., "
        "Neural Networks Behave as Hash Encoders, 2021; the diagnostics alone",
    ),
    "transcoder": Method(
        kind="measure",
        target="spectool.evaluate.measures.transcoder:TranscoderFidelity",
        summary="Sparse features of one MLP, learnt from the reference, that the model keeps",
        source="inspired by Dunefsky et al., 2024 (arXiv:2406.11944): one layer, half the features "
        "per width, less text",
        status="research",
    ),
    "generation": Method(
        kind="measure",
        target="spectool.evaluate.measures.generation:Generation",
        summary="Loops, repetition, ends and exact answers in texts that the checkpoint writes",
        source="Welleck et al., 2020 (arXiv:1908.04319); Li et al., 2016 (arXiv:1510.03055)",
    ),
    "tasks": Method(
        kind="measure",
        target="spectool.evaluate.measures.tasks:Tasks",
        summary="Scores of tasks, and what is lost of the reference's, question by question",
        source="Gao et al., lm-evaluation-harness",
    ),
    "speed": Method(
        kind="measure",
        target="spectool.evaluate.measures.speed:Speed",
        summary="Tokens per second with each drafter, next to plain decoding",
        source="a comparison in one process, in turns",
    ),
    "losslessness": Method(
        kind="measure",
        target="spectool.evaluate.measures.losslessness:Losslessness",
        summary="Share of prompts whose drafted output is plain decoding's",
        source="token for token, greedy",
    ),
}


def list_methods(kind: Kind) -> list[str]:
    """List the names of one kind of method, in the table's order."""
    return [key.rpartition(":")[2] for key, method in METHODS.items() if method.serves_as(kind)]


def list_trainable() -> list[str]:
    """List the drafters that `train-heads` can train."""
    return [name for name, method in METHODS.items() if method.trainable]


def get_method(name: str, kind: Kind) -> Method:
    """Look up a method by name.

    Raises:
        UsageError: no method of this kind has the name.
    """
    method = METHODS.get(f"{kind}:{name}", METHODS.get(name))
    if method is None or not method.serves_as(kind):
        raise UsageError(
            f"no {kind} is called {name!r}; known: {', '.join(list_methods(kind))}",
            hint=nearest(name, list_methods(kind)),
        )
    return method


def import_method(name: str, kind: Kind) -> Any:
    """Import a method's class, or a verifier's function."""
    module, _, attribute = get_method(name, kind).target.partition(":")
    return getattr(importlib.import_module(module), attribute)
