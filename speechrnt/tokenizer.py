"""Whisper's token ids, looked up by name in a model's own vocabulary.

One `Tokenizer` belongs to one model and never changes: language and task are arguments, not
state, so it may be shared by any number of threads and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from numbers import Integral

import tokenizers

from .errors import ModelLoadError, OptionError

__all__ = ["LANGUAGES", "TASKS", "TIME_PRECISION", "Tokenizer"]

TASKS = ("transcribe", "translate")

TIME_PRECISION = 0.02
"""Seconds between two neighbouring timestamp tokens."""

# Whisper's languages (openai/whisper, tokenizer.py, MIT), in alphabetical order; Cantonese joined
# with large-v3. A model knows those whose token is in its vocabulary.
LANGUAGES = tuple(
    "af am ar as az ba be bg bn bo br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha haw he "
    "hi hr ht hu hy id is it ja jw ka kk km kn ko la lb ln lo lt lv mg mi mk ml mn mr ms mt my ne "
    "nl nn no oc pa pl ps pt ro ru sa sd si sk sl sn so sq sr su sv sw ta te tg th tk tl tr tt uk "
    "ur uz vi yi yo zh yue".split()
)

# From 0 to 30 s.
_TIMESTAMPS = 1501

# What Whisper never says at temperature 0 when `suppress_tokens` holds -1: brackets, speaker marks
# and musical notes, each with and without a leading space (openai/whisper, `non_speech_tokens`).
_ANNOTATIONS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split(),
)
_MUSIC = "♩♪♫♬♭♮♯"


class Tokenizer:
    """Text to token ids and back, and the ids of the special tokens.

    Parameters
    ----------
    tokenizer
        The model's ``tokenizer.json``, loaded.
    multilingual
        Whether prompts carry a language and a task token.

    Attributes
    ----------
    sot, eot, sot_prev, sot_lm, transcribe, translate, no_speech, no_timestamps : int or None
        Ids of the special tokens; None where the vocabulary lacks one that decoding can do without.
    timestamp_begin : int
        Id of ``<|0.00|>``; all ids from here on are timestamps, `TIME_PRECISION` apart.
    languages : tuple of str
        Codes of the languages in the vocabulary; ``("en",)`` for an English-only model.

    Raises
    ------
    ModelLoadError
        If the vocabulary is not a Whisper vocabulary.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, multilingual: bool) -> None:
        self._tokenizer = tokenizer
        self.multilingual = multilingual
        self.sot = self._required("<|startoftranscript|>")
        self.eot = self._required("<|endoftext|>")
        self.no_timestamps = self._required("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1
        self.sot_prev = self._optional("<|startofprev|>")
        self.sot_lm = self._optional("<|startoflm|>")
        self.transcribe = self._optional("<|transcribe|>")
        self.translate = self._optional("<|translate|>")
        self.no_speech = self._optional("<|nospeech|>", "<|nocaptions|>")
        self.languages: tuple[str, ...] = ("en",)
        self._ids: dict[str, int] = {}  # of tasks and languages
        if multilingual:
            self._ids = {task: self._required(f"<|{task}|>") for task in TASKS}
            languages = ((code, self._optional(f"<|{code}|>")) for code in LANGUAGES)
            known = {code: token for code, token in languages if token is not None}
            self._ids |= known
            self.languages = tuple(known)
            if not self.languages:
                raise ModelLoadError("the tokenizer of a multilingual model has no language token")

    def _optional(self, *names: str) -> int | None:
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def _required(self, name: str) -> int:
        token = self._optional(name)
        if token is None:
            raise ModelLoadError(f"the tokenizer has no {name}: it is not a Whisper tokenizer")
        return token

    @property
    def hf_tokenizer(self) -> tokenizers.Tokenizer:
        """The underlying `tokenizers.Tokenizer`."""
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, special tokens and timestamps included."""
        # The tokenizers of some converted models leave the timestamps out.
        return max(self._tokenizer.get_vocab_size(), self.timestamp_begin + _TIMESTAMPS)

    def sot_sequence(self, language: str, task: str) -> list[int]:
        """Return the ids that open a transcript: start, and language and task if there are any.

        Parameters
        ----------
        language
            One of `languages`; not looked at if the model is English-only.
        task
            One of `TASKS`.

        Raises
        ------
        OptionError
            If the language or the task is unknown to the model.
        """
        if task not in TASKS:
            raise OptionError(f"task: {task!r} is unknown; use one of {', '.join(TASKS)}")
        if not self.multilingual:
            return [self.sot]
        if language not in self.languages:
            raise OptionError(
                f"language: {language!r} is not one this model knows; use one of "
                f"{', '.join(self.languages)}, or None to detect it"
            )
        return [self.sot, self._ids[language], self._ids[task]]

    def checked_ids(self, option: str, tokens: object, least: int = 0) -> list[int]:
        """Return `tokens` as a list of ids of this vocabulary.

        Parameters
        ----------
        option
            What the message of the error is to name.
        tokens
            Any iterable of integers.
        least
            The smallest number allowed.

        Raises
        ------
        OptionError
            If they are something else.
        """
        if not isinstance(tokens, Iterable) or isinstance(tokens, (str, bytes, Mapping)):
            raise OptionError(f"{option}: must be token ids, not {tokens!r}")
        size = self.vocabulary_size
        ids = []
        for token in tokens:
            good = isinstance(token, Integral) and not isinstance(token, bool)
            if not good or not least <= int(token) < size:
                raise OptionError(f"{option}: {token!r} is not a token id below {size}")
            ids.append(int(token))
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens around them.

        Raises
        ------
        OptionError
            If the text holds half a surrogate pair, which no encoding can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"text that is not valid Unicode: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; special tokens and timestamps are left out."""
        return self._tokenizer.decode([token for token in tokens if token < self.eot])

    def decode_with_timestamps(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, timestamps written as ``<|1.20|>``."""
        pieces: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token < self.timestamp_begin:
                run.append(token)
                continue
            pieces.append(self._tokenizer.decode(run))
            pieces.append(f"<|{(token - self.timestamp_begin) * TIME_PRECISION:.2f}|>")
            run = []
        pieces.append(self._tokenizer.decode(run))
        return "".join(pieces)

    @cached_property
    def non_speech_tokens(self) -> frozenset[int]:
        """Ids that begin annotations rather than speech: brackets, speaker marks, music."""
        # A hyphen or an apostrophe is wanted inside a word, not at its beginning.
        tokens = {self.encode(" -")[0], self.encode(" '")[0]}
        for symbol in (*_ANNOTATIONS, *_MUSIC):
            for text in (symbol, " " + symbol):
                ids = self.encode(text)
                # The musical signs share their first bytes only with signs of their Unicode block,
                # so that suppressing the first of several tokens is safe for them alone.
                if len(ids) == 1 or symbol in _MUSIC:
                    tokens.add(ids[0])
        return frozenset(tokens)

    def suppressed_tokens(self, tokens: Iterable[int] | None) -> tuple[int, ...]:
        """Return the ids to suppress while decoding, sorted.

        Parameters
        ----------
        tokens
            Ids to suppress; -1 stands for `non_speech_tokens`. The special tokens that have no
            place inside a transcript are added, unless `tokens` is None or empty: then nothing is
            suppressed at all.

        Raises
        ------
        OptionError
            If one of them is not in the vocabulary.
        """
        ids = [] if tokens is None else self.checked_ids("suppress_tokens", tokens, least=-1)
        if not ids:
            return ()
        wanted = set(ids)
        if -1 in wanted:
            wanted = (wanted - {-1}) | self.non_speech_tokens
        special = (
            self.transcribe,
            self.translate,
            self.sot,
            self.sot_prev,
            self.sot_lm,
            self.no_speech,
        )
        return tuple(sorted(wanted.union(token for token in special if token is not None)))
