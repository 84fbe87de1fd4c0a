from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spectool.decode.text import TextStream

PIECES = ["</s>", " a", " b", "a", "b", "c", "ab", "ST", "OP", "STO", "P!", "Ã", "©", " "]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pieces; "Ã" and "©" are the two bytes of an é."""
    vocab = {piece.replace(" ", "Ġ"): index for index, piece in enumerate(PIECES)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def feed(stream: TextStream, tokens: list[int]) -> list[str]:
    released = []
    for token in tokens:
        released.append(stream.push(token))
        if stream.stopped:
            return released
    return [*released, stream.finish()]


def test_the_first_piece_keeps_its_space(tokenizer: PreTrainedTokenizerFast) -> None:
    assert feed(TextStream(tokenizer, ids("a")), ids(" b", "c")) == [" b", "c", ""]


def test_a_character_comes_when_it_is_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ids("a"))
    assert feed(stream, ids("b", "Ã", "©", "c")) == ["b", "", "é", "c", ""]
    assert stream.text == "béc"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    assert feed(TextStream(tokenizer, ids("a")), ids("b", "Ã")) == ["b", "", "�"]


def test_a_character_begun_by_the_prompt_is_finished(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ids("a", "Ã"))
    feed(stream, ids("©", "c"))
    assert stream.text.endswith("c")


def test_stop_string_over_several_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ids("a"), ["STOP"])
    assert feed(stream, ids("b", "ST", "OP", "c")) == ["b", "", ""]
    assert stream.stopped
    assert stream.text == "b"


def test_stop_string_inside_a_token_and_the_earliest_counts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = TextStream(tokenizer, ids("a"), ["OP", "TO"])
    assert feed(stream, ids("b", "STO")) == ["b", "S"]
    assert stream.text == "bS"


def test_what_only_began_a_stop_string_is_released(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ids("a"), ["STOP"])
    assert feed(stream, ids("ST", "a", "ST")) == ["", "STa", "", "ST"]
    assert not stream.stopped


def test_released_text_never_holds_a_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    noise = random.Random(0)
    for _ in range(300):
        tokens = [noise.randrange(1, len(PIECES)) for _ in range(noise.randint(1, 12))]
        stops = [noise.choice(["STOP", "OPST", "ab", "TO", " a", "é"]) for _ in range(2)]
        stream = TextStream(tokenizer, ids("a"), stops)
        released = "".join(feed(stream, tokens))
        whole = tokenizer.decode(ids("a") + tokens)[1:]
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        assert released == stream.text
        if stream.stopped:
            assert released == whole[: min(cuts)]
        else:
            assert not cuts
            assert released == whole
