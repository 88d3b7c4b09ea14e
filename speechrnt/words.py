"""Words and their times, from the alignment of a transcript with the audio.

OpenAI's method (openai/whisper, timing.py) with the rules of faster-whisper 1.2.1: when each token
was said comes from the decoder's cross-attention, tokens become words, punctuation joins them, and
words that last improbably long are shortened. Pure functions; times stay NumPy numbers until
`finished`, since rounding those differs from rounding Python's, and faster-whisper rounds those.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import ctranslate2
import numpy as np

from .results import Word
from .tokenizer import TIME_PRECISION, Tokenizer

__all__ = [
    "MEDIAN_FILTER_WIDTH",
    "AlignedWord",
    "Passage",
    "add_words",
    "aligned_words",
    "finished",
    "hallucination",
    "last_end",
    "leading_silence",
    "merge_punctuation",
    "place_words",
    "shorten_long_words",
    "split_words",
    "text_tokens",
]

MEDIAN_FILTER_WIDTH = 7
"""Encoder frames over which the attention is smoothed before it is aligned."""

# Languages written without spaces: there, a word is what decodes to whole characters.
_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})

_REPLACEMENT = "\ufffd"
_SENTENCE_END = ".。!！?？"
_ALL_PUNCTUATION = "\"'“¿([{-\"'.。,，!！?？:：”)]}、"
_TOKENS_PER_SECOND = round(1 / TIME_PRECISION)

# The typical length of a word is not taken to be longer than this, in seconds.
_LONGEST_TYPICAL_S = 0.7

# How far a word may begin before its segment, or end after it, in seconds.
_SEGMENT_TOLERANCE_S = 0.5

# A word is odd if it is improbable, or shorter or longer than people speak; a segment, if enough of
# its first words are.
_IMPROBABLE = 0.15
_SHORT_S, _SHORT_WEIGHT = 0.133, 15
_LONG_S = 2.0
_JUDGED_WORDS = 8
_ANOMALY_SCORE = 3
# Text this close to an edge of its window, in seconds, has no speech between.
_EDGE_S = 2.0


@dataclass
class AlignedWord:
    """A word and when it was said, in seconds from the start of its window.

    The text and tokens are empty where they were merged into a neighbour.
    """

    text: str
    tokens: list[int]
    start: float
    end: float
    probability: float


@dataclass
class Passage:
    """A stretch of transcript that becomes a segment; times in seconds from the start of the audio.

    Its words are None where they were not asked for.
    """

    start: float
    end: float
    tokens: list[int]
    words: list[Word] | None = field(default=None)


def split_words(
    tokenizer: Tokenizer, tokens: Sequence[int], language: str
) -> tuple[list[str], list[list[int]]]:
    """Return the words of a transcript, and the tokens of each.

    A special token is a word of its own.
    """
    pieces, piece_tokens = _split_at_characters(tokenizer, tokens)
    if language in _WITHOUT_SPACES:
        return pieces, piece_tokens
    words: list[str] = []
    word_tokens: list[list[int]] = []
    for piece, ids in zip(pieces, piece_tokens, strict=True):
        begins = (
            not words
            or ids[0] >= tokenizer.eot
            or piece.startswith(" ")
            or piece.strip() in string.punctuation
        )
        if begins:
            words.append(piece)
            word_tokens.append(ids)
        else:
            words[-1] += piece
            word_tokens[-1] += ids
    return words, word_tokens


def _split_at_characters(
    tokenizer: Tokenizer, tokens: Sequence[int]
) -> tuple[list[str], list[list[int]]]:
    """Split where tokens decode to whole characters."""
    text = tokenizer.decode_with_timestamps(tokens)
    pieces: list[str] = []
    piece_tokens: list[list[int]] = []
    current: list[int] = []
    length = 0
    for token in tokens:
        current.append(token)
        piece = tokenizer.decode_with_timestamps(current)
        # Half a character decodes to the replacement character, unless the transcript itself has
        # one there.
        place = piece.find(_REPLACEMENT)
        if place < 0 or text[length + place : length + place + 1] == _REPLACEMENT:
            pieces.append(piece)
            piece_tokens.append(current)
            current = []
            length += len(piece)
    return pieces, piece_tokens


def aligned_words(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    language: str,
    alignment: ctranslate2.models.WhisperAlignmentResult,
) -> list[AlignedWord]:
    """Return the words of a window's transcript with their times.

    Parameters
    ----------
    tokenizer, language
        See `split_words`.
    tokens
        The transcript, without timestamps.
    alignment
        What CTranslate2 aligned: pairs of token and encoder frame, and the tokens' probabilities.
    """
    words, word_tokens = split_words(tokenizer, [*tokens, tokenizer.eot], language)
    # The last one is the end of the transcript.
    boundaries = np.cumsum([0, *(len(ids) for ids in word_tokens[:-1])])
    if len(boundaries) < 2 or not alignment.alignments:
        return []  # no text, or less audio than one frame of the encoder
    token_indices, frames = (np.array(column) for column in zip(*alignment.alignments, strict=True))
    is_new = np.diff(token_indices, prepend=-1) > 0
    times = frames[is_new] / _TOKENS_PER_SECOND
    probabilities = alignment.text_token_probs
    return [
        AlignedWord(word, ids, times[first], times[past], np.mean(probabilities[first:past]))
        for word, ids, first, past in zip(
            words, word_tokens, boundaries[:-1], boundaries[1:], strict=False
        )
    ]


def shorten_long_words(words: list[AlignedWord]) -> tuple[float, float]:
    """Cut words at the end of sentences that last too long.

    The silence between two sentences is easily taken for part of a word.

    Returns
    -------
    typical, longest
        Seconds that a word lasts in this window, and that one may last.
    """
    durations = np.array([word.end - word.start for word in words])
    durations = durations[durations.nonzero()]
    typical = min(_LONGEST_TYPICAL_S, float(np.median(durations))) if len(durations) else 0.0
    longest = typical * 2
    if len(durations):
        for previous, word in pairwise(words):
            if word.end - word.start > longest:
                if word.text in _SENTENCE_END:
                    word.end = word.start + longest
                elif previous.text in _SENTENCE_END:
                    word.start = word.end - longest
    return typical, longest


def merge_punctuation(words: list[AlignedWord], prepended: str, appended: str) -> None:
    """Join marks to the words that they belong to.

    Parameters
    ----------
    words
        Those merged into a neighbour stay in the list, empty.
    prepended, appended
        Marks that belong to the word after them, and to the word before.
    """
    following = len(words) - 1
    for i in range(len(words) - 2, -1, -1):
        mark, word = words[i], words[following]
        if mark.text.startswith(" ") and mark.text.strip() in prepended:
            word.text = mark.text + word.text
            word.tokens = mark.tokens + word.tokens
            mark.text, mark.tokens = "", []
        else:
            following = i
    previous = 0
    for i in range(1, len(words)):
        word, mark = words[previous], words[i]
        if not word.text.endswith(" ") and mark.text in appended:
            word.text += mark.text
            word.tokens = word.tokens + mark.tokens
            mark.text, mark.tokens = "", []
        else:
            previous = i


def place_words(
    passages: Sequence[Passage],
    words: Sequence[AlignedWord],
    text_lengths: Sequence[int],
    window_start: float,
    typical: float,
    longest: float,
    speech_end: float,
) -> float:
    """Give the passages of a window their words; adjust the times of both to each other.

    Parameters
    ----------
    passages
        Changed in place.
    words
        Those of the whole window, after `shorten_long_words` and `merge_punctuation`.
    text_lengths
        How many of each passage's tokens are text.
    window_start
        Where the times of `words` count from, in seconds.
    typical, longest
        From `shorten_long_words`.
    speech_end
        Where the speech before this window ended, in seconds.

    Returns
    -------
    float
        Where the speech ends now.
    """
    index = 0
    for passage, n_tokens in zip(passages, text_lengths, strict=True):
        placed: list[Word] = []
        taken = 0
        while index < len(words) and taken < n_tokens:
            word = words[index]
            if word.text:
                start, end = (round(window_start + t, 2) for t in (word.start, word.end))
                placed.append(Word(start, end, word.text, word.probability))
            taken += len(word.tokens)
            index += 1
        passage.words = placed
        if placed:
            _shorten_after_pause(placed, typical, longest, speech_end)
            _reconcile(passage, placed, typical)
            speech_end = passage.end
    return speech_end


def _shorten_after_pause(
    words: list[Word], typical: float, longest: float, speech_end: float
) -> None:
    """Keep the first two words after a pause from reaching into it."""
    first = words[0]
    if first.end - speech_end <= typical * 4:
        return
    second = words[1] if len(words) > 1 else None
    if first.end - first.start <= longest and (
        second is None or second.end - first.start <= longest * 2
    ):
        return
    if second is not None and second.end - second.start > longest:
        first.end = second.start = max(second.end / 2, second.end - longest)
    first.start = max(0, first.end - longest)


def _reconcile(passage: Passage, words: list[Word], typical: float) -> None:
    """Let words give the passage its times, unless the outer ones are longer than likely."""
    first, last = words[0], words[-1]
    if passage.start < first.end and passage.start - _SEGMENT_TOLERANCE_S > first.start:
        first.start = max(0, min(first.end - typical, passage.start))
    else:
        passage.start = first.start
    if passage.end > last.start and passage.end + _SEGMENT_TOLERANCE_S < last.end:
        last.end = max(last.start + typical, passage.end)
    else:
        passage.end = last.end


def last_end(passages: Sequence[Passage]) -> float | None:
    """Return when the last word ends, or else the last passage; None without passages."""
    for passage in reversed(passages):
        if passage.words:
            return passage.words[-1].end
    return passages[-1].end if passages else None


def leading_silence(
    passages: Sequence[Passage], window_start: float, threshold: float
) -> float | None:
    """Return the seconds before a first passage that looks made up, if they are too many.

    The text may be an invention for the silence: the audio behind that is to be decoded by itself.
    """
    first = next((passage for passage in passages if passage.words), None)
    if first is not None and _is_anomalous(first) and first.start - window_start > threshold:
        return first.start - window_start
    return None


def hallucination(
    passages: Sequence[Passage],
    threshold: float,
    window_start: float,
    window_duration: float,
    window_end: float,
    speech_end: float,
) -> int | None:
    """Return the index of the first passage that looks made up and has silence around it, if any.

    Parameters
    ----------
    passages
        Those of one window, with their words.
    threshold
        Seconds of silence.
    window_start, window_duration, window_end
        The window: where its audio begins, how long that is, and where a full window would end.
    speech_end
        Where the speech before this window ended, in seconds.
    """
    for i, passage in enumerate(passages):
        if not passage.words:
            continue
        if _is_anomalous(passage):
            following = next((p for p in passages[i + 1 :] if p.words), None)
            if following is not None and following.words:
                next_start = following.words[0].start
            else:
                next_start = window_start + window_duration
            silence_before = (
                passage.start - speech_end > threshold
                or passage.start < threshold
                or passage.start - window_start < _EDGE_S
            )
            silence_after = (
                next_start - passage.end > threshold
                or (following is not None and _is_anomalous(following))
                or window_end - passage.end < _EDGE_S
            )
            if silence_before and silence_after:
                return i
        speech_end = passage.end
    return None


def _is_anomalous(passage: Passage) -> bool:
    words = [word for word in passage.words or () if word.word not in _ALL_PUNCTUATION]
    words = words[:_JUDGED_WORDS]
    score = sum(_anomaly(word) for word in words)
    return score >= _ANOMALY_SCORE or score + 0.01 >= len(words)


def _anomaly(word: Word) -> float:
    duration = word.end - word.start
    score = 1.0 if word.probability < _IMPROBABLE else 0.0
    if duration < _SHORT_S:
        score += (_SHORT_S - duration) * _SHORT_WEIGHT
    if duration > _LONG_S:
        score += duration - _LONG_S
    return score


def finished(words: Sequence[Word] | None) -> list[Word] | None:
    """Return the words with Python's own numbers."""
    if words is None:
        return None
    return [
        Word(float(word.start), float(word.end), word.word, float(word.probability))
        for word in words
    ]


def text_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Return what of a transcript is text, as `ctranslate2.models.Whisper.align` takes it."""
    return [token for token in tokens if token < tokenizer.eot]


def add_words(
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    language: str,
    alignment: Any,
    punctuation: tuple[str, str],
    window_start: float,
    speech_end: float,
) -> float:
    """Give the passages of a window their words; see `place_words` for what changes and returns.

    Parameters
    ----------
    alignment
        Of the text of all passages; None where they have none.
    punctuation
        Marks that belong to the word after them, and to the word before.
    """
    texts = [text_tokens(tokenizer, passage.tokens) for passage in passages]
    words = []
    if alignment is not None:
        joined = [token for text in texts for token in text]
        words = aligned_words(tokenizer, joined, language, alignment)
    typical, longest = shorten_long_words(words)
    merge_punctuation(words, *punctuation)
    return place_words(
        passages,
        words,
        [len(text) for text in texts],
        window_start,
        typical,
        longest,
        speech_end,
    )
