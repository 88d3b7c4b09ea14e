"""What goes into a decoding call and how its result is read: prompts, scores, timestamps.

Pure functions and frozen records over token ids; the rules are those of openai/whisper as
faster-whisper 1.2.1 applies them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ctranslate2

from .tokenizer import TIME_PRECISION, Tokenizer

__all__ = [
    "MAX_LENGTH",
    "MAX_PROMPT_TOKENS",
    "DecodingResult",
    "Slice",
    "build_prompt",
    "compression_ratio",
    "ends_in_one_timestamp",
    "length_limit",
    "max_new_tokens",
    "parse_result",
    "search_arguments",
    "split_by_timestamps",
]

MAX_LENGTH = 448
"""Positions of the decoder: prompt and transcript together."""

MAX_PROMPT_TOKENS = MAX_LENGTH // 2 - 1
"""Most tokens of previous text that go before a transcript."""

_FRAMES_PER_TIMESTAMP = 2


@dataclass(frozen=True)
class DecodingResult:
    """One window's transcript.

    Attributes
    ----------
    tokens
        Ids of text and timestamps, without the end-of-text token.
    text
        The decoded text, stripped.
    avg_logprob
        Mean log probability per token, the end-of-text token included.
    no_speech_prob
        Probability of ``<|nospeech|>`` in place of a transcript.
    compression_ratio
        See `compression_ratio`.
    temperature
        What it was sampled at; 0 is beam search.
    is_cut_off
        Whether the model was stopped before it ended the transcript itself.
    """

    tokens: list[int]
    text: str
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    temperature: float
    is_cut_off: bool


@dataclass(frozen=True)
class Slice:
    """A stretch of one window's transcript between two timestamps.

    Attributes
    ----------
    start, end
        Seconds from the start of the window.
    tokens
        Its ids, with the timestamps.
    """

    start: float
    end: float
    tokens: list[int]


def build_prompt(
    tokenizer: Tokenizer,
    language: str,
    task: str,
    previous_tokens: Sequence[int],
    without_timestamps: bool,
    max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    *,
    hotwords: Sequence[int] = (),
    prefix: Sequence[int] = (),
    new_tokens: int = 0,
) -> list[int]:
    """Return the ids a window's decoding starts from.

    Parameters
    ----------
    tokenizer, language, task
        See `Tokenizer.sot_sequence`.
    previous_tokens
        The transcript so far.
    without_timestamps
        Whether the transcript shall be free of timestamps.
    max_prompt_tokens
        How many of the last `previous_tokens` to use.
    hotwords
        What stands before `previous_tokens` in every window; not together with a prefix.
    prefix
        What the transcript begins with.
    new_tokens
        Positions to keep free for the transcript: there are fewer `previous_tokens`, if need be.
    """
    opening = tokenizer.sot_sequence(language, task)
    if without_timestamps:
        opening.append(tokenizer.no_timestamps)
    if prefix:
        if not without_timestamps:
            opening.append(tokenizer.timestamp_begin)
        opening += prefix
        hotwords = ()
    room = MAX_LENGTH - new_tokens - len(opening) - len(hotwords) - 1
    n_previous = max(0, min(max_prompt_tokens, room, len(previous_tokens)))
    if tokenizer.sot_prev is None or not (hotwords or n_previous):
        return opening
    return [
        tokenizer.sot_prev,
        *hotwords,
        *previous_tokens[len(previous_tokens) - n_previous :],
        *opening,
    ]


def search_arguments(
    temperature: float, beam_size: int, patience: float, best_of: int
) -> dict[str, Any]:
    """Return CTranslate2's arguments for beam search (temperature 0) or sampling."""
    if temperature == 0:
        return {"beam_size": beam_size, "patience": patience}
    return {
        "beam_size": 1,
        "num_hypotheses": best_of,
        "sampling_topk": 0,
        "sampling_temperature": temperature,
    }


def compression_ratio(text: str) -> float:
    """Return how many times zlib makes the text smaller: over 2.4, it repeats itself."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def max_new_tokens(prompt_length: int, max_length: int = MAX_LENGTH) -> int:
    """Return after how many tokens CTranslate2 stops a transcript, finished or not."""
    # The last token of the prompt is fed in the step that yields the first one of the transcript.
    return min(max_length // 2, max_length - (prompt_length - 1))


def length_limit(new_tokens: int, prompt_length: int) -> int:
    """Return the `max_length` with which CTranslate2 stops a transcript after so many tokens.

    The inverse of what `max_new_tokens` says of `MAX_LENGTH`, which is the most that is returned.
    """
    return min(MAX_LENGTH, max(2 * new_tokens, new_tokens + prompt_length - 1))


def parse_result(
    result: ctranslate2.models.WhisperGenerationResult,
    tokenizer: Tokenizer,
    prompt_length: int,
    temperature: float,
    length_penalty: float,
    max_length: int = MAX_LENGTH,
) -> DecodingResult:
    """Read CTranslate2's result of one window, decoded from a prompt of so many tokens."""
    tokens = result.sequences_ids[0]
    # The score is the sum of the log probabilities divided by length ** length_penalty, where the
    # length does not count the end-of-text token though the sum does. Of an empty transcript, a
    # negative penalty leaves nothing: it is not trusted.
    total = -math.inf
    if tokens or length_penalty >= 0:
        total = result.scores[0] * len(tokens) ** length_penalty
    text = tokenizer.decode(tokens).strip()
    return DecodingResult(
        tokens=tokens,
        text=text,
        avg_logprob=total / (len(tokens) + 1),
        no_speech_prob=result.no_speech_prob,
        compression_ratio=compression_ratio(text),
        temperature=temperature,
        is_cut_off=len(tokens) >= max_new_tokens(prompt_length, max_length),
    )


def ends_in_one_timestamp(tokens: Sequence[int], timestamp_begin: int) -> bool:
    """Tell whether a transcript ends in a timestamp after text: nothing is said after that."""
    return len(tokens) > 1 and tokens[-2] < timestamp_begin <= tokens[-1]


def split_by_timestamps(
    tokens: list[int], timestamp_begin: int, window_frames: int, window_duration: float
) -> tuple[list[Slice], int]:
    """Cut a window's transcript at its pairs of timestamps.

    Parameters
    ----------
    tokens
        The transcript.
    timestamp_begin
        Id of ``<|0.00|>``.
    window_frames, window_duration
        Length of the window's audio in mel frames and in seconds.

    Returns
    -------
    slices
        Between consecutive timestamps, in order; one slice when there is no pair.
    frames
        How far to seek from the start of the window. Where the transcript ends in a pair, the
        model may have stopped in the middle of something: the next window starts there. Otherwise
        the window is done.
    """
    cuts = [
        i
        for i in range(1, len(tokens))
        if tokens[i - 1] >= timestamp_begin and tokens[i] >= timestamp_begin
    ]
    if not cuts:
        last = next((t for t in reversed(tokens) if t >= timestamp_begin), timestamp_begin)
        end = (last - timestamp_begin) * TIME_PRECISION
        return [Slice(0.0, end or window_duration, tokens)], window_frames

    is_done = ends_in_one_timestamp(tokens, timestamp_begin)
    if is_done:
        cuts.append(len(tokens))
    slices = []
    for first, past in zip([0, *cuts], cuts, strict=False):
        piece = tokens[first:past]
        start = (piece[0] - timestamp_begin) * TIME_PRECISION
        end = (piece[-1] - timestamp_begin) * TIME_PRECISION
        slices.append(Slice(start, end, piece))
    if is_done:
        return slices, window_frames
    return slices, (tokens[cuts[-1] - 1] - timestamp_begin) * _FRAMES_PER_TIMESTAMP
