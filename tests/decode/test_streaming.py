"""Streamed text is the decoded whole, cut before stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectool.decode.streaming import TextStream

PIECES = ["</s>", " a", " b", "a", "b", "c", "ab", "ST", "OP", "STO", "P!", "Ã", "©", " "]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte-level pieces; "Ã" and "©" are the two bytes of an é."""
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
    assert feed(stream, ids("©", "c")) == ["é", "c", ""]


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


SYLLABLES = ["▁", "▁a", "▁dog", "▁ran", "▁off", "x", "yz", "�", "▁▁"]


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's: special tokens, 256 bytes, pieces; strips a first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SYLLABLES]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["<|tool|>", " → "])
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(checkpoint: Callable[..., Path]) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE of the tiny models."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(checkpoint("llama"))
    return loaded


def named(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def bytes_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return named(tokenizer, *(f"<0x{byte:02X}>" for byte in text.encode()))


def whole_text(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode the whole and cut the common prefix with the prompt's text: the specification."""
    lead = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole: str = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    shared = next((i for i, (a, b) in enumerate(zip(lead, whole, strict=False)) if a != b), None)
    return whole[min(len(lead), len(whole)) if shared is None else shared :]


def snippets(tokenizer: Any, noise: random.Random, pieces: Sequence[int]) -> list[int]:
    """Return tokens that mix any ids with whole and broken characters."""
    tokens: list[int] = []
    for _ in range(noise.randint(0, 12)):
        kind = noise.randrange(4)
        if kind == 0:
            text = noise.choice(["😀", "é", "€😀", "\n", "a"])
            encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += encoded[: noise.choice([1, 2, 3, 9, 9, 9])]
        elif kind == 1:
            tokens += [noise.choice(pieces)] * noise.randint(1, 3)
        else:
            tokens += [noise.choice(pieces) for _ in range(noise.randint(1, 5))]
    return tokens


def check_streams(tokenizer: Any, rounds: int, seed: int) -> None:
    noise = random.Random(seed)
    # Also ids beyond the vocabulary: lm_heads are padded.
    pieces = range(len(tokenizer) + 3)
    for _ in range(rounds):
        prompt = snippets(tokenizer, noise, pieces)
        tokens = snippets(tokenizer, noise, pieces)
        expected = whole_text(tokenizer, prompt, tokens)
        stream = TextStream(tokenizer, prompt)
        assert "".join(feed(stream, tokens)) == stream.text == expected, (prompt, tokens)
        late = TextStream(tokenizer, prompt, live=False)
        assert feed(late, tokens) == [""] * len(tokens) + [expected]
        if len(expected) < 3:
            continue
        at = noise.randrange(len(expected) - 1)
        stop = expected[at : at + noise.randint(1, 3)]
        stream = TextStream(tokenizer, prompt, [stop])
        released = "".join(feed(stream, tokens))
        assert released == stream.text
        assert stop not in released
        if "\ufffd" not in stop and "\ufffd" not in expected:
            assert stream.stopped
            assert released == expected[: expected.index(stop)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["tokenizer", "fallback", "byte_level"])
def test_streamed_text_is_the_decoded_whole(
    request: pytest.FixtureRequest, kind: str, seed: int
) -> None:
    check_streams(request.getfixturevalue(kind), 150, seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stories260K", "codestory-10M", "TinyStories-656K", "babyllama-char-a"]
)
def test_streamed_text_is_the_decoded_whole_of_real_tokenizers(shared: Path, name: str) -> None:
    check_streams(AutoTokenizer.from_pretrained(shared / "models" / name), 400, 0)


def test_tokens_that_end_inside_characters(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = byte_level("😀" * 9)["input_ids"]
    stream = TextStream(byte_level, [])
    released = feed(stream, tokens)
    assert "".join(released) == "😀" * 9
    assert max(map(len, released)) == 1


def test_special_tokens_do_not_eat_a_space(fallback: PreTrainedTokenizerFast) -> None:
    tokens = named(fallback, "▁a", "▁dog", "<s>", "▁ran", "</s>", "<s>", "▁off")
    stream = TextStream(fallback, named(fallback, "<s>"))
    assert feed(stream, tokens) == ["a", " dog", "", " ran", "", "", " off", ""]


def test_a_run_of_byte_tokens_counts_as_one(fallback: PreTrainedTokenizerFast) -> None:
    """An invalid byte spoils the whole run, so nothing of a run is released before its end."""
    prompt = named(fallback, "x")
    stream = TextStream(fallback, prompt)
    tokens = [*bytes_of(fallback, "é\n"), *named(fallback, "▁a")]
    assert feed(stream, tokens) == ["", "", "", "é\n a", ""]
    broken = [*bytes_of(fallback, "é"), *named(fallback, "<0xF0>", "▁a")]
    assert feed(TextStream(fallback, prompt), broken) == ["", "", "", "��� a", ""]


def test_a_stop_string_of_bytes_ends_the_text_at_once(fallback: PreTrainedTokenizerFast) -> None:
    tokens = [*named(fallback, "▁a"), *bytes_of(fallback, "é\n"), *named(fallback, "x")]
    stream = TextStream(fallback, named(fallback, "x"), ["\n"])
    assert feed(stream, tokens) == [" a", "", "", "é"]
    assert stream.stopped


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.decoded += len(tokens)
        text: str = self._tokenizer.decode(tokens, **options)
        return text


@pytest.mark.parametrize("kind", ["words", "specials", "garbage", "runs"])
def test_the_work_per_token_does_not_grow(
    byte_level: PreTrainedTokenizerFast, fallback: PreTrainedTokenizerFast, kind: str
) -> None:
    tokens = {
        "words": byte_level("def make(path): return path")["input_ids"] * 200,
        "specials": [0] * 2000,
        "garbage": byte_level("😀")["input_ids"][-1:] * 2000,
        "runs": [*bytes_of(fallback, "é" * 500), *named(fallback, "▁a", "x")] * 2,
    }[kind]
    counting: Any = Counting(fallback if kind == "runs" else byte_level)
    stream = TextStream(counting, tokens[:5])
    released = feed(stream, tokens)
    assert counting.decoded < 30 * len(tokens)
    late: Any = Counting(counting._tokenizer)
    assert feed(TextStream(late, tokens[:5], live=False), tokens)[-1] == "".join(released)
    assert late.decoded < len(tokens) + 20
