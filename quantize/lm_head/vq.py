"""VQ-Logits (`vq`): lm_head rows share vectors of a codebook (`--lm-head vq`).

With groups of `width` components, `stages` codebooks per group and one code per row, group and
stage,

    w'_i = concat_g sum_s C_gs[k_igs],    logit_i = w'_i . h + b_i.

With one code per row (width 0, one stage) tokens that share a code differ only by their bias, and
the softmax factors exactly: with M the code of a token and m_c = log sum_(i in c) e^(b_i),

    log P(i) = (l_M(i) + b_i) - log sum_c e^(l_c + m_c),    l = C h.

The loss is then higher by at least I(token; context | code), which is at most H(token | code); that
entropy on the text is reported. Frequent and special tokens get dedicated codes.

Codes start as k-means of the rows in the metric H = E[h h^T], with tokens weighted by frequency.
The vectors are trained as C = E A (SimVQ), together with b, by KL(original || vq) on calibration
text; after each epoch every row is assigned its nearest codes again.

With `shortlist` N the shared vectors only rank tokens: the best N get exact logits from rows stored
at 8 bits in addition. That saves time but no memory.

Source: VQ-Logits, 2025 (arXiv:2505.10202), where the model is trained with such an lm_head; bias,
metric and distillation of an existing lm_head are ours. Zhu et al., SimVQ, 2024 (arXiv:2411.02038).
Shapes: n rows (V tokens), m components (D width), K codes, S stages, G groups, W width of a group,
T tokens of text.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import UsageError
from spectool.model.packed import FieldSpec, PackedLinear, TensorSpec
from spectool.options import option
from spectool.quantize.base import PackedFields, Tick
from spectool.quantize.codebook import LinearCodebook, cluster_vectors, mean_by_label
from spectool.quantize.lm_head.base import FittedLmHead, LmHead, LmHeadQuantizer, LmHeadReport
from spectool.quantize.methods.gptq import DAMPING
from spectool.quantize.methods.int8 import Int8
from spectool.quantize.statistics import LinearStats
from spectool.training import Metrics, Recipe, Training

# Share of the text that is held out to compare epochs.
HELD_OUT = 1 / 16
# About as many logits per step, but at least this many tokens.
STEP_LOGITS, STEP_TOKENS = 1 << 22, 256


class VQ(LmHeadQuantizer):
    """VQ-Logits; see the module docstring."""

    name = "vq"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        codes: int = option(256, "vectors of a codebook", minimum=2, maximum=32767)
        width: int = option(4, "components that share a code; 0: the whole row", minimum=0)
        stages: int = option(
            1, "codebooks, each for the residual of those before", minimum=1, maximum=8
        )
        frequent: int = option(
            64, "most frequent tokens that get a dedicated code, with one code a row", minimum=0
        )
        shortlist: int = option(
            0, "best tokens whose logits are computed from 8-bit rows; 0: none", minimum=0
        )
        epochs: int = option(10, "passes over the calibration text", minimum=0)
        lr: float = option(0.02, "learning rate, in the vectors' own size", minimum=0)

        def validate(self) -> None:
            if self.single and self.frequent + 1 >= self.codes:
                raise UsageError(
                    f"--codes {self.codes}: {self.frequent} tokens with dedicated codes leave none "
                    "to share"
                )

        @property
        def single(self) -> bool:
            """Whether each row has one code, so that the softmax factors."""
            return self.width == 0 and self.stages == 1

    config: Config

    def find_misfit(self, shape: tuple[int, int]) -> str:
        if self.config.codes <= shape[0]:
            return ""
        return f"{self} has more codes than the {shape[0]} rows of the matrix"

    def find_lm_head_misfit(self, shape: tuple[int, int], num_special: int) -> str:
        frequent = self.config.frequent
        if self.config.single and num_special + frequent >= self.config.codes:
            return (
                f"{self}: up to {num_special} special and {frequent} frequent tokens have codes of "
                "their own, which leaves no code for the others"
            )
        return self.find_misfit(shape)

    def fit_lm_head_bytes(self, shape: tuple[int, int]) -> int:
        """Estimate the bytes of a fit.

        In float32: the matrix, the decoded matrix and its gradient, the vectors of each stage, and
        some distributions over the tokens of a step; three copies of the codes as int64.
        """
        (tokens, columns), width = shape, self.config.width or shape[1]
        each: int = 12 + self.config.stages * (8 + 24 // width)
        return each * tokens * columns + 24 * max(STEP_LOGITS, STEP_TOKENS * tokens)

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        width = min(self.config.width or m, m)
        groups, codes = -(-m // width), min(self.config.codes, n)
        codes_dtype = torch.uint8 if codes <= 256 else torch.int16
        spec: dict[str, TensorSpec] = {
            "codes": (codes_dtype, (n, groups * self.config.stages)),
            "codebook": (torch.float16, (self.config.stages, groups, codes, width)),
        }
        if self.config.shortlist:
            exact = Int8().layout(shape)
            spec |= {f"exact_{name}": value for name, value in exact.items()}
        return spec

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix by k-means of its rows, with equal weights and no training."""
        weight_nm = weight_nm.float()
        books = init_books(
            weight_nm, weight_nm.new_ones(len(weight_nm)), None, (), self.config, generator
        )
        return books.fields(weight_nm)

    def build(self, shape: tuple[int, int]) -> VQLinear:
        return VQLinear(self.layout(shape), shape, self.config)

    def fit_lm_head(self, lm_head: LmHead, generator: torch.Generator, tick: Tick) -> FittedLmHead:
        config, weight_VD = self.config, lm_head.weight_VD
        counts_V, device = lm_head.counts_V.double(), weight_VD.device
        dedicated: tuple[int, ...] = ()
        if config.single:
            frequent = counts_V.argsort(descending=True, stable=True)[: config.frequent].tolist()
            dedicated = tuple(dict.fromkeys((*lm_head.special, *frequent)))
        dedicated_A = torch.tensor(dedicated, dtype=torch.long, device=device)
        hessian_DD = _input_hessian(lm_head.states_TD, device)
        # Token weights for k-means: logarithmic, so that frequent tokens do not dominate.
        frequency_V = 1 + (1 + counts_V).log().float()
        books = init_books(weight_VD, frequency_V, hessian_DD, dedicated, config, generator)
        entropy = token_entropy_within_codes(counts_V, books.codes_nSG.flatten(1))
        no_bias_V = torch.zeros_like(weight_VD[:, 0])
        bias_V = no_bias_V if lm_head.bias_V is None else lm_head.bias_V.clone()
        if config.single:
            # Tokens of a code start with their shares of the text.
            bias_V += _log_shares(counts_V, books.codes_nSG[:, 0, 0])
        student = Distillation(lm_head, books, bias_V)
        num_train = len(student.train_TD)
        every = max(1, math.ceil(num_train / student.rows))
        steps = config.epochs * every
        batches: list[Tensor] = []

        def accumulate(step: int) -> Metrics:
            if step % every == 0:
                if step:
                    books.reassign(weight_VD, hessian_DD, dedicated_A)
                order_T = torch.randperm(num_train, generator=generator)
                batches[:] = torch.split(order_T, student.rows)
            with torch.enable_grad():
                loss = student.loss(student.train_TD[batches[step % every]])
                torch.autograd.backward(loss)
            tick((step + 1) / (steps + 1))
            return {"loss": float(loss.detach())}

        training = Training(
            name="vq",
            module=student,
            optimizers=[student.make_optimizer(config.lr)],
            recipe=Recipe(steps=steps, annealing=True, clip=None, every=every),
            accumulate=accumulate,
            evaluate=lambda: {"score": -student.measure()},
            keep=lambda: (copy.deepcopy(books), student.bias_V.detach().clone()),
        )
        history = training.run()
        assert history.best is not None
        books, bias_V = training.best
        fields = books.fields(weight_VD)
        used = [len(set(column.tolist())) for column in fields["codes"].T]
        report = LmHeadReport(
            nats_within_codes=entropy,
            loss_start=-history.evaluations[0]["score"],
            loss_after=-history.best["score"],
            best_epoch=history.best["step"] // every,
            codes_used=sum(used) / len(used),
        )
        return FittedLmHead(fields, bias_V, report)


class Books(LinearCodebook):
    """Codebooks C = E A [S, G, K, W] in training, with codes [n, S, G]."""

    def __init__(self, config: VQ.Config, centres_SGKW: Tensor, codes_nSG: Tensor) -> None:
        super().__init__(centres_SGKW)
        self.config, self.codes_nSG = config, codes_nSG

    @torch.no_grad()
    def fields(self, weight_nm: Tensor) -> PackedFields:
        """Make the stored fields: unused vectors are dropped, and zeros fill the end."""
        n, m = weight_nm.shape
        book_SGKW: Tensor = self()
        kept_SGKW, codes_nSG = torch.zeros_like(book_SGKW), torch.zeros_like(self.codes_nSG)
        for s, stage in enumerate(book_SGKW):
            for g, book_KW in enumerate(stage):
                used_K, renamed_n = torch.unique(self.codes_nSG[:, s, g], return_inverse=True)
                kept_SGKW[s, g, : len(used_K)] = book_KW[used_K]
                codes_nSG[:, s, g] = renamed_n
        dtype = VQ(self.config).layout((n, m))["codes"][0]
        fields = {"codes": codes_nSG.flatten(1).to(dtype), "codebook": kept_SGKW.half()}
        if self.config.shortlist:
            exact = Int8().pack(weight_nm, None, torch.Generator())
            fields |= {f"exact_{name}": value for name, value in exact.items()}
        return fields

    @torch.no_grad()
    def reassign(self, weight_nm: Tensor, hessian_mm: Tensor | None, dedicated: Tensor) -> None:
        """Assign every row its nearest codes, stage by stage; rows `dedicated` keep theirs."""
        book_SGKW: Tensor = self()
        for g, group in enumerate(_split_columns(weight_nm, self.config.width)):
            left_nW = group.clone()
            root_WW = _metric_root(hessian_mm, g, group)
            for s, book_KW in enumerate(book_SGKW[:, g]):
                near_n = _nearest(left_nW @ root_WW, book_KW @ root_WW)
                near_n[dedicated] = self.codes_nSG[dedicated, s, g]
                self.codes_nSG[:, s, g] = near_n
                left_nW = left_nW - book_KW[near_n]


def _decode(codebook_SGKW: Tensor, codes_nSG: Tensor, columns: int) -> Tensor:
    """Decode codes [n, S, G] to the matrix [n, columns]."""
    stages, groups, codes, width = codebook_SGKW.shape
    first_SG = codes * torch.arange(stages * groups, device=codes_nSG.device)
    index_nSG = codes_nSG + first_SG.view(stages, groups)
    vectors_nSGW = F.embedding(index_nSG, codebook_SGKW.view(-1, width))
    return vectors_nSGW.sum(1).flatten(1)[:, :columns]


def _split_columns(weight_nm: Tensor, width: int) -> list[Tensor]:
    """Split the columns into groups [n, W], the last one padded with zeros."""
    m = weight_nm.shape[1]
    width = min(width or m, m)
    return list(torch.split(F.pad(weight_nm, (0, -m % width)), width, 1))


def _metric_root(hessian_mm: Tensor | None, g: int, group_nW: Tensor) -> Tensor:
    """Return a root R [W, W] of group g's part of the metric H: |x R| is the norm of x in H."""
    width = group_nW.shape[1]
    inner_WW = torch.eye(width, device=group_nW.device)
    if hessian_mm is not None:
        part = hessian_mm[g * width : (g + 1) * width, g * width : (g + 1) * width]
        inner_WW[: len(part), : len(part)] = part
    root_WW: Tensor = torch.linalg.cholesky(inner_WW)
    return root_WW


def _nearest(points_PW: Tensor, centres_KW: Tensor) -> Tensor:
    """Return the index of each point's nearest centre [P]."""
    return torch.cat(
        [torch.cdist(part, centres_KW).argmin(1) for part in torch.split(points_PW, 1 << 13)]
    )


def init_books(
    weight_nm: Tensor,
    weights_n: Tensor,
    hessian_mm: Tensor | None,
    dedicated: tuple[int, ...],
    config: VQ.Config,
    generator: torch.Generator,
) -> Books:
    """Initialise codes and codebooks by k-means in the metric H.

    `weights_n` are the weights of the rows; tokens `dedicated` get codes that no other token has.

    Raises:
        UsageError: more codes than rows.
    """
    n = len(weight_nm)
    if config.codes > n:
        raise UsageError(f"--codes {config.codes}: the matrix has {n} rows")
    centres: list[list[Tensor]] = [[] for _ in range(config.stages)]
    groups = _split_columns(weight_nm, config.width)
    device = weight_nm.device
    codes_nSG = torch.zeros(n, config.stages, len(groups), dtype=torch.long, device=device)
    dedicated_A = torch.tensor(dedicated, dtype=torch.long, device=device)
    others = torch.ones(n, dtype=torch.bool, device=device)
    others[dedicated_A] = False
    shared = config.codes - len(dedicated)
    for g, group_nW in enumerate(groups):
        root_WW = _metric_root(hessian_mm, g, group_nW)
        left_nW = group_nW
        for s in range(config.stages):
            points_PW = left_nW[others] @ root_WW
            label_P = cluster_vectors(points_PW, weights_n[others], shared, generator)
            codes_nSG[others, s, g] = label_P
            codes_nSG[dedicated_A, s, g] = torch.arange(len(dedicated), device=device) + shared
            book_KW = mean_by_label(left_nW, weights_n, codes_nSG[:, s, g], config.codes)
            centres[s].append(book_KW)
            left_nW = left_nW - book_KW[codes_nSG[:, s, g]]
    return Books(config, torch.stack([torch.stack(stage) for stage in centres]), codes_nSG)


class Distillation(nn.Module):
    """Codes, codebooks and bias in training, by KL from the original lm_head's logits."""

    def __init__(self, lm_head: LmHead, books: Books, bias_V: Tensor) -> None:
        super().__init__()
        self.lm_head, self.books, self.bias_V = lm_head, books, nn.Parameter(bias_V)
        size = max(1, int(HELD_OUT * len(lm_head.states_TD)))
        self.train_TD, self.held_out_TD = lm_head.states_TD[size:], lm_head.states_TD[:size]
        # Tokens of a step.
        self.rows = max(STEP_TOKENS, STEP_LOGITS // len(lm_head.weight_VD))

    def loss(self, states_TD: Tensor) -> Tensor:
        """Compute the mean of KL(original || vq) over tokens with these inputs."""
        weight_VD, finish = self.lm_head.weight_VD, self.lm_head.finish
        books, bias_V = self.books, self.bias_V
        book_SGKW: Tensor = books()
        states_TD = states_TD.to(weight_VD.device)
        target_TV = finish(F.linear(states_TD, weight_VD, self.lm_head.bias_V)).log_softmax(-1)
        probs_TV = target_TV.exp()
        negative_entropy_T = (probs_TV * target_TV).sum(-1)
        # With one code per row by the factored softmax, over codes instead of tokens.
        if books.config.single and finish is Tensor.float:
            code_V, book_KD = books.codes_nSG[:, 0, 0], book_SGKW[0, 0]
            logit_TK = states_TD @ book_KD.T
            mass_K = log_mass(bias_V, code_V, len(book_KD))
            probs_TK = torch.zeros_like(logit_TK).index_add_(1, code_V, probs_TV)
            chosen_T = (probs_TK * logit_TK).sum(-1) + probs_TV @ bias_V
            return (negative_entropy_T - chosen_T + (logit_TK + mass_K).logsumexp(-1)).mean()
        decoded_VD = _decode(book_SGKW, books.codes_nSG, states_TD.shape[1])
        logits_TV = finish(F.linear(states_TD, decoded_VD, bias_V))
        return (negative_entropy_T - (probs_TV * logits_TV.log_softmax(-1)).sum(-1)).mean()

    @torch.no_grad()
    def measure(self) -> float:
        """Compute the mean loss over the held-out tokens."""
        parts = torch.split(self.held_out_TD, self.rows)
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(self.held_out_TD)

    def make_optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Create the optimizer; rates of vectors are in their own size."""
        groups = [
            {"params": [values], "lr": rate * float(values.detach().square().mean().sqrt())}
            for values in self.books.parameters()
        ]
        return torch.optim.AdamW(
            [*groups, {"params": [self.bias_V], "lr": 10 * rate}], weight_decay=0.0
        )


def _input_hessian(states_TD: Tensor, device: torch.device) -> Tensor:
    """Compute the damped H = mean h h^T [D, D] of inputs."""
    hessian_DD = torch.zeros(states_TD.shape[1], states_TD.shape[1], device=device)
    for part_TD in torch.split(states_TD, 1 << 13):
        on_device_TD = part_TD.to(device)
        hessian_DD.addmm_(on_device_TD.T, on_device_TD)
    hessian_DD /= len(states_TD)
    hessian_DD.diagonal().add_(DAMPING * hessian_DD.diagonal().mean() + 1e-12)
    return hessian_DD


def log_mass(bias_V: Tensor, code_V: Tensor, count: int) -> Tensor:
    """Return m_c = log sum_(i in c) e^(b_i) for each code [K]; minus infinity for unused codes."""
    top_K = bias_V.new_full((count,), -torch.inf)
    top_K = top_K.scatter_reduce(0, code_V, bias_V.detach(), "amax")
    safe_K = torch.where(top_K.isfinite(), top_K, 0.0)
    sums_K = bias_V.new_zeros(count).index_add(0, code_V, (bias_V - safe_K[code_V]).exp())
    return sums_K.log() + safe_K


def token_entropy_within_codes(counts_V: Tensor, codes_VC: Tensor) -> float:
    """Return H(token | code) of tokens with these counts, in nats."""
    _, code_V = torch.unique(codes_VC, dim=0, return_inverse=True)
    total = float(counts_V.sum())
    if total == 0:
        return 0.0
    mass_K = counts_V.new_zeros(int(code_V.max()) + 1).index_add_(0, code_V, counts_V)
    share_V = torch.where(counts_V > 0, counts_V / mass_K[code_V].clamp(min=1e-300), 1.0)
    return max(0.0, float(-(counts_V * share_V.log()).sum() / total))


def _log_shares(counts_V: Tensor, code_V: Tensor) -> Tensor:
    """Return the log of each token's share of its code's counts, with 1/2 added to each count."""
    counted_V = counts_V + 0.5
    mass_K = counted_V.new_zeros(int(code_V.max()) + 1).index_add_(0, code_V, counted_V)
    return (counted_V / mass_K[code_V]).log().float()


class VQLinear(PackedLinear):
    """Packed linear of `vq`.

    Fields: codes U8 or I16 [n, S G], codebook F16 [S, G, K, W]; with a shortlist also exact_codes
    I8 [n, m] and exact_scale F32 [n].
    """

    config: VQ.Config
    format = "vq"

    @property
    def is_matrix(self) -> bool:
        return not self.config.shortlist

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Dequantize some rows; with a shortlist the 8-bit ones."""
        if self.config.shortlist:
            return self.q.exact_codes[rows].float() * (self.q.exact_scale[rows] / 127)[:, None]
        return self._shared(rows)

    def _shared(self, rows: slice | Tensor) -> Tensor:
        """Decode some rows from the codebook."""
        stages = self.config.stages
        codes_nSG = torch.unflatten(self.q.codes[rows].long(), 1, (stages, -1))
        return _decode(self.q.codebook.float(), codes_nSG, self.in_features)

    def has_kernel(self) -> bool:
        """Return whether there are tables, or one code a row: products are gathered from either."""
        return self.product is not None or (self.config.single and not self.config.shortlist)

    def forward(self, x: Tensor) -> Tensor:
        out = self._multiply(x)
        if not self.config.shortlist:
            return out
        count = min(self.config.shortlist, self.out_features)
        best = out.topk(count, -1).indices
        flat_TN, x_Tm = best.flatten(0, -2), x.flatten(0, -2)
        # One row at a time, so that its logits do not depend on the other rows.
        pairs = zip(flat_TN, x_Tm, strict=True)
        exact_TN = torch.stack([self.rows(tokens_N).to(x.dtype) @ x_m for tokens_N, x_m in pairs])
        if self.bias is not None:
            exact_TN = exact_TN + self.bias[flat_TN]
        return out.scatter(-1, best, exact_TN.view(best.shape))

    def _multiply(self, x: Tensor) -> Tensor:
        """Compute the product with the shared vectors."""
        if self.product is not None and self.product.supports(x):
            product: Tensor = self.product(x, self.bias)
            return product
        if not self.config.single:
            return F.linear(x, self._shared(slice(None)).to(x.dtype), self.bias)
        book_Km = self.q.codebook[0, 0].to(x.dtype)
        out = F.linear(x, book_Km)[..., self.q.codes[:, 0].long()]
        return out if self.bias is None else out + self.bias
