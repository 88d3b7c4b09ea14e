"""When a partial transcript can be relied on: LocalAgreement.

What transcripts of a growing window begin with alike is committed (Liu, Spanakis, Niehues,
"Low-latency sequence-to-sequence speech recognition and translation by partial hypothesis
selection", Interspeech 2020; Macháček, Dabre, Bojar, "Turning Whisper into real-time transcription
system", 2023). There, two transcripts must agree. But models complete sentences that they have not
heard the end of, and do it alike while there is little more audio; so the agreement must have
lasted, too, as in RealtimeSTT's stabilizer.
"""

from __future__ import annotations

from itertools import takewhile

from .languages import UNSPACED

__all__ = ["LocalAgreement", "join_words", "split_words"]


def split_words(text: str, language: str) -> list[str]:
    """Return the words of a text, or its characters where words are not spaced."""
    words = text.split()
    if language in UNSPACED:
        return list("".join(words))
    return words


def join_words(words: list[str], language: str) -> str:
    """Return the text of words."""
    return ("" if language in UNSPACED else " ").join(words)


# Seconds of audio that an agreement must have lasted.
_LASTING_S = 0.75


class LocalAgreement:
    """What is committed of one window, and what its latest transcript says beyond that."""

    def __init__(self) -> None:
        self.committed: list[str] = []
        self.unstable: list[str] = []
        # Transcripts, and seconds of audio that they are of: the last that is old enough to commit
        # words, and all after it.
        self._recent: list[tuple[float, list[str]]] = []

    def update(self, words: list[str], audio_s: float) -> list[str]:
        """Take the transcript of more audio than the last, and return what it commits.

        The last word is left out: the audio may end within it. A transcript that begins otherwise
        than what is committed commits nothing.

        Parameters
        ----------
        words
            The transcript.
        audio_s
            Seconds of audio that it is of, from anywhere.
        """
        words = words[:-1]
        is_old = [audio_s - at >= _LASTING_S for at, _ in self._recent]
        del self._recent[: max(sum(is_old) - 1, 0)]
        n_committed = len(self.committed)
        new: list[str] = []
        if any(is_old) and words[:n_committed] == self.committed:
            agreed = min(_length_in_common(earlier, words) for _, earlier in self._recent)
            new = words[n_committed:agreed]
            self.committed += new
        self._recent.append((audio_s, words))
        self.unstable = words[len(self.committed) :]
        return new

    def contradicted_by(self, words: list[str]) -> int:
        """Return how many committed words a final transcript does not begin with."""
        return len(self.committed) - _length_in_common(self.committed, words)


def _length_in_common(left: list[str], right: list[str]) -> int:
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
