"""What an utterance says: collected window by window, and as a whole."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from .latency import StageTimings
from .pools import TranscriptionResult, TranscriptionResultPool
from .results import Segment
from .tokenizer import Tokenizer
from .utterance import Final, spaced

__all__ = ["Transcript", "Transcription"]


@dataclass(frozen=True)
class Transcription:
    """What was said in a recording or a stream.

    Attributes
    ----------
    text : str
        All of it.
    segments : tuple of Segment
        The windows in which something was said: text, ids, scores, and where they lie in seconds.
    language : str
        The language it was decoded in. Where it changed, that of the most audio.
    language_probability : float
        How sure the model was; 1 for a language that was given.
    duration : float
        Seconds of audio.
    timings : StageTimings
        Where the time went.
    warnings : tuple of str
        What was wrong without making the audio or an option unusable.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str
    language_probability: float
    duration: float
    timings: StageTimings
    warnings: tuple[str, ...] = ()


class Transcript:
    """The finals of an utterance so far, in a record of a pool from the first word on.

    There, a token takes four bytes, which counts in streams of hours. Thread-safe.

    Parameters
    ----------
    pool
        Lends the record.
    tokenizer
        Of the model.

    Attributes
    ----------
    n_finals : int
        Finals so far, silent ones included.
    """

    def __init__(self, pool: TranscriptionResultPool, tokenizer: Tokenizer) -> None:
        self.n_finals = 0
        self._pool = pool
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._record: TranscriptionResult | None = None
        self._is_released = False
        self._is_empty = True
        self._lengths: Counter[str] = Counter()  # samples by language
        self._probabilities: dict[str, float] = {}

    def add(self, final: Final) -> None:
        """Take the final of the next window; does nothing once released."""
        with self._lock:
            if self._is_released:
                return
            self.n_finals += 1
            language = final.language
            self._lengths[language] += final.cut.end - final.cut.start
            known = self._probabilities.get(language, 0.0)
            self._probabilities[language] = max(known, final.language_probability)
            segment = final.segment
            if segment is None:
                return
            if self._record is None:
                self._record = self._pool.acquire()
            text = spaced(segment.text, language, self._is_empty)
            self._is_empty = self._is_empty and not text
            self._record.append(
                text,
                segment.tokens,
                segment.start,
                segment.end,
                seek=segment.seek,
                avg_logprob=segment.avg_logprob,
                no_speech_prob=segment.no_speech_prob,
                compression_ratio=segment.compression_ratio,
            )

    def finish(
        self,
        language: str | None,
        duration: float,
        timings: StageTimings,
        warnings: tuple[str, ...],
    ) -> Transcription:
        """Return all of it.

        Parameters
        ----------
        language
            The one that was given.
        duration, timings, warnings
            See `Transcription`.
        """
        with self._lock:
            if self._lengths:
                [(main, _)] = self._lengths.most_common(1)
                probability = self._probabilities[main]
            else:
                main, probability = language or "", float(language is not None)
            return Transcription(
                text="" if self._record is None else self._record.text,
                segments=self._segments(),
                language=main,
                language_probability=probability,
                duration=duration,
                timings=timings,
                warnings=warnings,
            )

    def _segments(self) -> tuple[Segment, ...]:
        if self._record is None:
            return ()
        all_tokens = self._record.tokens
        segments = []
        for number, part in enumerate(self._record.segments, start=1):
            tokens = all_tokens[part.first_token : part.first_token + part.n_tokens]
            segments.append(
                Segment(
                    id=number,
                    seek=part.seek,
                    start=part.start,
                    end=part.end,
                    text=self._tokenizer.decode(tokens),
                    tokens=tokens,
                    avg_logprob=part.avg_logprob,
                    compression_ratio=part.compression_ratio,
                    no_speech_prob=part.no_speech_prob,
                    words=None,
                    temperature=0.0,
                )
            )
        return tuple(segments)

    def release(self) -> None:
        """Give the record back, and take nothing more. May be called again."""
        with self._lock:
            self._is_released = True
            record, self._record = self._record, None
        if record is not None:
            record.release()
