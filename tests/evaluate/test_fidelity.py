from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from spectool.data.windows import cut
from spectool.evaluate.fidelity import LogProbsReference, score


@pytest.mark.parametrize("bos", [None, 3])
def test_sums_equal_the_definitions_token_by_token(bos: int | None, table_probs: Any) -> None:
    ids = torch.randint(
        0, table_probs.size, (41,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    windows = cut(ids, length=6, bos=bos)
    ours, theirs = table_probs(2), table_probs(3)
    scores = score(
        windows, ours, table_probs.size, reference=LogProbsReference(theirs), batch_size=2
    )
    nll = reference_nll = kl = 0.0
    same = count = 0
    for group in windows.groups:
        for row in group.tolist():
            for before, after in itertools.pairwise(row):
                p, q = theirs.logp_VV[before].double(), ours.logp_VV[before].double()
                nll -= float(q[after])
                reference_nll -= float(p[after])
                kl += float((p.exp() * (p - q)).sum())
                same += int(p.argmax() == q.argmax())
                count += 1
    assert scores.num_tokens == count == windows.num_tokens
    assert scores.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert scores.reference_perplexity == pytest.approx(math.exp(reference_nll / count), rel=1e-6)
    assert scores.kl == pytest.approx(kl, rel=1e-5)
    assert scores.same_top == same


def test_a_model_equals_itself(table_probs: Any) -> None:
    windows = cut([0, 1, 2, 3, 4, 5] * 5, length=6, bos=None)
    log_probs = table_probs(0)
    scores = score(windows, log_probs, table_probs.size, reference=LogProbsReference(log_probs))
    assert scores.kl == pytest.approx(0, abs=1e-6)
    assert scores.same_top == scores.num_tokens
    assert scores.perplexity == scores.reference_perplexity
