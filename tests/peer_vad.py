"""Speech as both sides see it."""

import faster_whisper.transcribe
import faster_whisper.vad
import numpy as np
import pytest

from speechrnt import speech_timestamps


@pytest.fixture
def same_probabilities(monkeypatch):
    """Give faster-whisper the probabilities of our network: its own is an older one."""

    def model(padded):
        return np.array(list(speech_timestamps._probabilities(model.audio)))[:, np.newaxis]

    def seen(audio, *arguments):
        model.audio = audio
        return find(audio, *arguments)

    find = faster_whisper.vad.get_speech_timestamps
    monkeypatch.setattr(faster_whisper.vad, "get_vad_model", lambda: model)
    monkeypatch.setattr(faster_whisper.transcribe, "get_speech_timestamps", seen)
