"""What the tests of `WhisperModel` share."""

import numpy as np

import speechrnt

RATE = 16000
SILENCE = np.zeros(RATE, dtype=np.float32)


def text(model, audio, **options):
    return "".join(segment.text for segment in model.transcribe(audio, **options)[0]).strip()


def joined(samples, manifest, seconds, lang="en"):
    """Clips of one language, half a second apart, and their text."""
    pieces, words, length = [], [], 0
    for clip in manifest:
        if clip["lang"] == lang and length < seconds * RATE:
            pieces += [speechrnt.decode_audio(samples / clip["file"]), SILENCE[: RATE // 2]]
            words.append(clip["text"])
            length += len(pieces[-2]) + len(pieces[-1])
    return np.concatenate(pieces), " ".join(words)
