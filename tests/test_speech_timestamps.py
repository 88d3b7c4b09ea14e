"""Speech in a recording: the rules of faster-whisper, on the same probabilities."""

import random

import faster_whisper.vad as peer
import numpy as np
import pytest

import speechrnt
from speechrnt import speech_timestamps as ours
from speechrnt.errors import OptionError
from speechrnt.vad import FRAME_SAMPLES

RATE = 16000


def random_probabilities(dice):
    """Runs of speech and silence, with values at and around the thresholds."""
    values = [0.0, 0.05, 0.1, 0.2, 0.34, 0.35, 0.36, 0.49, 0.5, 0.51, 0.65, 0.8, 1.0]
    frames = []
    while len(frames) < dice.choice([1, 30, 300, 900]):
        frames += [dice.choice(values)] * dice.choice([1, 2, 4, 10, 70])
    return np.array(frames, dtype=np.float32)


@pytest.mark.parametrize("seed", range(200))
def test_the_same_speech_from_the_same_probabilities(monkeypatch, seed):
    dice = random.Random(seed)
    probabilities = random_probabilities(dice)
    options = {
        "threshold": dice.choice([0.5, 0.35, 0.8, 0.1]),
        "neg_threshold": dice.choice([None, None, 0.2, 0.65]),
        "min_speech_duration_ms": dice.choice([0, 100, 250, 1000]),
        "max_speech_duration_s": dice.choice([float("inf"), 30, 5, 2.5, 0.9]),
        "min_silence_duration_ms": dice.choice([2000, 500, 160, 0]),
        "speech_pad_ms": dice.choice([400, 1000, 33, 0]),
    }
    n_samples = max(0, len(probabilities) * FRAME_SAMPLES - dice.randint(1, FRAME_SAMPLES))
    monkeypatch.setattr(peer, "get_vad_model", lambda: lambda audio: probabilities[:, np.newaxis])
    silence = np.zeros(n_samples, dtype=np.float32)
    expected = peer.get_speech_timestamps(silence, peer.VadOptions(**options))
    checked = ours.vad_options(options)
    assert ours.speech_spans(probabilities.tolist(), n_samples, checked) == expected


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_collected_the_same(seed):
    dice = random.Random(seed)
    audio = np.arange(60 * RATE, dtype=np.float32)
    edges = sorted(dice.sample(range(len(audio)), 2 * dice.randint(0, 12)))
    spans = [{"start": s, "end": e} for s, e in zip(edges[::2], edges[1::2], strict=True)]
    longest = dice.choice([float("inf"), 30, 10, 3])
    chunks, metadata = ours.collect_chunks(audio, spans, max_duration=longest)
    expected_chunks, expected_metadata = peer.collect_chunks(audio, spans, max_duration=longest)
    assert len(chunks) == len(expected_chunks)
    for chunk, expected in zip(chunks, expected_chunks, strict=True):
        np.testing.assert_array_equal(chunk, expected)
    for each, expected in zip(metadata, expected_metadata, strict=True):
        assert (each["offset"], each["duration"]) == (expected["offset"], expected["duration"])
    # The peer loses the first stretch of each further chunk here.
    assert [span for each in metadata for span in each["segments"]] == spans


@pytest.mark.parametrize("seed", range(20))
def test_times_are_restored_the_same(seed):
    dice = random.Random(seed)
    edges = sorted(dice.sample(range(0, 60 * RATE, 32), 2 * dice.randint(1, 12)))
    spans = [{"start": s, "end": e} for s, e in zip(edges[::2], edges[1::2], strict=True)]
    actual = ours.SpeechTimestampsMap(spans, RATE)
    expected = peer.SpeechTimestampsMap(spans, RATE)
    ends = [end / RATE for end in expected.chunk_end_sample]
    for time in [*ends, *(dice.uniform(0, 60) for _ in range(50))]:
        for is_end in (False, True):
            assert actual.get_chunk_index(time, is_end) == expected.get_chunk_index(time, is_end)
            restored = actual.get_original_time(time, is_end=is_end)
            assert restored == expected.get_original_time(time, is_end=is_end)


def test_options_are_those_of_the_peer():
    assert vars(ours.VadOptions()) == vars(peer.VadOptions())


def test_options_of_the_peer_will_do():
    options = ours.vad_options(peer.VadOptions(threshold=0.3))
    assert options == ours.VadOptions(threshold=0.3)


def test_speech_is_found(samples):
    clip = speechrnt.decode_audio(samples / "s03_en.wav")
    pause = np.zeros(3 * RATE, dtype=np.float32)
    audio = np.concatenate([pause, clip, pause, clip, pause])
    spans = ours.get_speech_timestamps(audio, min_silence_duration_ms=1000)
    assert len(spans) == 2
    for span, start in zip(spans, [3 * RATE, 6 * RATE + len(clip)], strict=True):
        assert abs(span["start"] - start) < RATE
        assert abs(span["end"] - start - len(clip)) < RATE


@pytest.mark.parametrize("samples", [0, 1, 511, 512, 513, 512 * 256, 512 * 256 + 1])
def test_silence_of_any_length_holds_no_speech(samples):
    assert ours.get_speech_timestamps(np.zeros(samples, dtype=np.float32)) == []


def test_the_last_frame_is_never_full():
    """As with the peer, which fills up a whole frame, too."""
    for samples, frames in ((0, 1), (511, 1), (512, 2), (513, 2)):
        audio = np.zeros(samples, dtype=np.float32)
        assert len(list(ours._probabilities(audio))) == frames


def test_another_rate_is_refused():
    with pytest.raises(OptionError, match="sampling_rate"):
        ours.get_speech_timestamps(np.zeros(10, dtype=np.float32), sampling_rate=8000)
