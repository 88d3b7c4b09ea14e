"""Where windows are cut: rules on any sequence of frames, and on real recordings."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechrnt import segmentation
from speechrnt.segmentation import (
    Cutter,
    Pause,
    SegmentationOptions,
    Segmenter,
    SpeechEnd,
    SpeechStart,
    WindowCut,
    loudness,
)
from speechrnt.vad import FRAME_SAMPLES

SPEECH, UNSURE, SILENCE = 0.9, 0.4, 0.05

# Runs of frames of one probability, long and short, and how loud the frames are.
runs = st.lists(
    st.tuples(st.sampled_from([SPEECH, UNSURE, SILENCE]), st.integers(1, 60)), max_size=25
)
options = st.builds(
    SegmentationOptions,
    endpoint_s=st.sampled_from([None, 0.1, 0.3, 0.5, 1.5]),
    min_speech_s=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    padding_s=st.sampled_from([0.0, 0.1, 0.3]),
    max_window_s=st.sampled_from([1.0, 2.0, 3.7, 10.0]),
)

seeds = st.integers(0, 2**32 - 1)


def random_levels(probabilities, seed):
    return np.random.default_rng(seed).integers(0, 4, len(probabilities)).tolist()


def frames_of(runs):
    return [probability for probability, n in runs for _ in range(n)]


def segment(probabilities, options, levels=None, n_samples=None, origin=0):
    """Return all events of a recording."""
    segmenter = Segmenter(options, origin)
    levels = [1.0] * len(probabilities) if levels is None else levels
    events = []
    for probability, level in zip(probabilities, levels, strict=True):
        events += segmenter.push(probability, level)
    if n_samples is None:
        n_samples = len(probabilities) * FRAME_SAMPLES
    return events + segmenter.finish(n_samples)


def windows_of(events):
    return [event for event in events if isinstance(event, WindowCut)]


def frames(seconds):
    return round(seconds * 16_000 / FRAME_SAMPLES)


@settings(max_examples=300)
@given(seed=seeds, runs=runs, options=options, missing=st.integers(0, FRAME_SAMPLES - 1))
@example(
    seed=0,
    runs=[(SPEECH, 1), (SILENCE, 3)],
    options=SegmentationOptions(endpoint_s=0.1, min_speech_s=0.0, padding_s=0.1),
    missing=1,
)
def test_windows_are_in_order_apart_and_never_too_long(seed, runs, options, missing):
    probabilities = frames_of(runs)
    levels = random_levels(probabilities, seed)
    missing = missing if probabilities else 0
    n_samples = len(probabilities) * FRAME_SAMPLES - missing
    windows = windows_of(segment(probabilities, options, levels, n_samples))
    end = 0
    for window in windows:
        # An endpoint is found in whole frames: it is the cutter that knows that the last is filled.
        last = n_samples + missing if window.reason == "endpoint" else n_samples
        assert end <= window.start < window.end <= last
        assert window.end - window.start <= options.max_window_s * 16_000
        assert window.start <= window.speech_start <= window.speech_end <= window.end
        end = window.end
    for before, window in zip([None, *windows], windows, strict=False):
        if window.continues:
            # Where a window was cut for its length, though what was before may be silent.
            assert before is None or before.end <= window.start
            rest = min(frames(1.0), int(options.max_window_s * 16_000) // FRAME_SAMPLES // 4)
            assert window.end - window.start >= rest * FRAME_SAMPLES - missing
    assert all(window.reason != "endpoint" for window in windows if options.endpoint_s is None)


@settings(max_examples=300)
@given(seed=seeds, runs=runs, options=options)
def test_all_that_is_long_enough_for_speech_is_in_a_window(seed, runs, options):
    probabilities = frames_of(runs)
    levels = random_levels(probabilities, seed)
    inside = set()
    for window in windows_of(segment(probabilities, options, levels)):
        inside.update(range(window.start // FRAME_SAMPLES, window.end // FRAME_SAMPLES))
    least = max(frames(options.min_speech_s), 1)
    start = 0
    while start < len(probabilities):
        end = start
        while end < len(probabilities) and probabilities[end] == SPEECH:
            end += 1
        if end - start >= least:
            assert inside.issuperset(range(start, end))
        start = end + 1


@settings(max_examples=200)
@given(runs=runs, options=options)
def test_speech_begins_and_ends_by_turns(runs, options):
    events = segment(frames_of(runs), options)
    turns = [event for event in events if isinstance(event, SpeechStart | SpeechEnd)]
    assert [type(turn) for turn in turns] == [SpeechStart, SpeechEnd] * (len(turns) // 2)
    assert [turn.sample for turn in turns] == sorted(turn.sample for turn in turns)


@settings(max_examples=200)
@given(runs=runs, options=options)
def test_silence_that_goes_on_cuts_what_the_pause_announced(runs, options):
    announced = None
    is_fresh = True  # nothing was cut since, so that the same window is still open
    for event in segment(frames_of(runs), options):
        if isinstance(event, Pause):
            announced, is_fresh = event.cut, True
        elif isinstance(event, WindowCut):
            if event.reason == "endpoint" and is_fresh:
                assert event == announced
            is_fresh = event.reason != "limit"


@settings(max_examples=100)
@given(runs=runs, options=options, origin=st.integers(0, 10**9))
def test_an_origin_moves_everything_and_changes_nothing(runs, options, origin):
    probabilities = frames_of(runs)
    moved = windows_of(segment(probabilities, options, origin=origin))
    unmoved = windows_of(segment(probabilities, options))
    assert [(w.start - origin, w.end - origin, w.reason) for w in moved] == [
        (w.start, w.end, w.reason) for w in unmoved
    ]


@pytest.mark.parametrize("level", [0.0, 0.05, 0.34, 0.49])
def test_what_never_reaches_the_threshold_has_no_events(level):
    segmenter = Segmenter(SegmentationOptions())
    assert not any(segmenter.push(level, 1.0) for _ in range(5000))
    assert segmenter.finish(5000 * FRAME_SAMPLES) == []
    assert segmenter.window_start is None


def test_nothing_has_no_events():
    assert segment([], SegmentationOptions()) == []


def test_a_pause_ends_a_window_with_padding_on_both_sides():
    probabilities = [SILENCE] * 50 + [SPEECH] * 40 + [SILENCE] * 30
    start, pause, cut, end = segment(probabilities, SegmentationOptions())
    padding = frames(0.3)
    assert start == SpeechStart(50 * FRAME_SAMPLES)
    assert cut == WindowCut(
        (50 - padding) * FRAME_SAMPLES,
        (90 + padding) * FRAME_SAMPLES,
        50 * FRAME_SAMPLES,
        90 * FRAME_SAMPLES,
        "endpoint",
        False,
    )
    assert pause == Pause(cut)
    assert end == SpeechEnd(90 * FRAME_SAMPLES)


def test_the_cut_comes_with_the_frame_that_makes_the_pause_long_enough():
    segmenter = Segmenter(SegmentationOptions(endpoint_s=0.5))
    for _ in range(40):
        segmenter.push(SPEECH, 1.0)
    came = [bool(windows_of(segmenter.push(SILENCE, 1.0))) for _ in range(20)]
    assert came.index(True) == frames(0.5) - 1


def test_a_shorter_pause_ends_nothing():
    probabilities = [SPEECH] * 40 + [SILENCE] * 15 + [SPEECH] * 40 + [SILENCE] * 40
    [window] = windows_of(segment(probabilities, SegmentationOptions(endpoint_s=0.5)))
    assert (window.speech_start, window.speech_end) == (0, 95 * FRAME_SAMPLES)


def test_hesitation_between_the_thresholds_is_no_pause():
    probabilities = [SPEECH] * 40 + [UNSURE] * 60 + [SPEECH] * 40 + [SILENCE] * 40
    [window] = windows_of(segment(probabilities, SegmentationOptions()))
    assert window.speech_end == 140 * FRAME_SAMPLES


def test_a_click_is_no_speech():
    probabilities = [SILENCE] * 20 + [SPEECH] * 3 + [SILENCE] * 40
    assert segment(probabilities, SegmentationOptions(min_speech_s=0.25)) == []
    assert windows_of(segment(probabilities, SegmentationOptions(min_speech_s=0.0)))


def test_the_end_of_the_audio_ends_the_window_in_the_middle_of_a_word():
    n_samples = 40 * FRAME_SAMPLES - 100
    events = segment([SPEECH] * 40, SegmentationOptions(), n_samples=n_samples)
    assert events == [
        SpeechStart(0),
        WindowCut(0, n_samples, 0, n_samples, "end", False),
        SpeechEnd(n_samples),
    ]


def test_of_equally_quiet_places_the_latest_is_cut():
    options = SegmentationOptions(endpoint_s=None, max_window_s=10.0)
    longest, rest = (10 * 16_000) // FRAME_SAMPLES, frames(1.0)
    first, second = windows_of(segment([SPEECH] * (longest + 50), options))
    assert first.reason == "limit"
    assert first.end == (longest - rest) * FRAME_SAMPLES == second.start
    assert (second.reason, second.continues) == ("end", True)


@pytest.mark.parametrize("quiet", [230, 260, 279])
def test_a_long_window_is_cut_at_the_quietest_place_of_its_last_seconds(quiet):
    options = SegmentationOptions(max_window_s=10.0)
    levels = [1.0] * 400
    levels[100] = 0.0  # too early
    levels[quiet - 2 : quiet + 3] = [0.1] * 5
    first = windows_of(segment([SPEECH] * 400, options, levels))[0]
    assert quiet - 1 <= first.end // FRAME_SAMPLES <= quiet + 1


def test_speech_without_any_pause_is_cut_again_and_again():
    options = SegmentationOptions(max_window_s=5.0)
    windows = windows_of(segment([SPEECH] * frames(120), options))
    assert len(windows) > 24
    assert [w.end for w in windows[:-1]] == [w.start for w in windows[1:]]
    assert windows[-1].end == frames(120) * FRAME_SAMPLES
    assert all(w.continues for w in windows[1:])


def test_silence_after_a_cut_is_no_window():
    # Speech ends a little before the limit: what follows the cut holds none.
    options = SegmentationOptions(endpoint_s=5.0, max_window_s=10.0)
    longest = (10 * 16_000) // FRAME_SAMPLES
    levels = [1.0] * (longest - 60) + [0.0] * 460
    probabilities = [SPEECH] * (longest - 60) + [SILENCE] * 460
    [window] = windows_of(segment(probabilities, options, levels))
    assert (window.reason, window.speech_end) == ("limit", (longest - 60) * FRAME_SAMPLES)


def test_half_an_hour_takes_no_more_memory_than_a_minute():
    segmenter = Segmenter(SegmentationOptions())

    def traced_after(seconds):
        for _ in range(frames(seconds)):
            segmenter.push(SPEECH, 1.0)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        assert traced_after(60) * 1.5 > traced_after(1800)
    finally:
        tracemalloc.stop()


def test_loudness_is_the_reach_of_the_samples():
    assert loudness(np.array([0.5, -0.25, 0.0], dtype=np.float32)) == [0.75]
    assert loudness(np.full(FRAME_SAMPLES, 0.5, dtype=np.float32)) == [0.0]
    assert loudness(np.zeros(0, dtype=np.float32)) == []


def test_loudness_is_that_of_each_frame_and_of_the_rest():
    samples = np.zeros(2 * FRAME_SAMPLES + 1, dtype=np.float32)
    samples[0], samples[FRAME_SAMPLES], samples[-1] = 0.5, -0.25, 1.0
    assert loudness(samples) == [0.5, 0.25, 0.0]


def cut(recording, groups, flushes=(), detects_speech=True, options=None):
    """Push frames in groups of so many, again and again; flush where asked."""
    cutter = Cutter(options or SegmentationOptions(max_window_s=4.0), detects_speech)
    events, ends, turn = [], [*flushes, len(recording)], 0
    for end in ends:
        while end - cutter.position >= FRAME_SAMPLES:
            n = min(groups[turn % len(groups)], (end - cutter.position) // FRAME_SAMPLES)
            turn += 1
            events += cutter.push(recording[cutter.position :][: n * FRAME_SAMPLES])
        events += cutter.flush(recording[cutter.position : end])
    assert cutter.position == len(recording)
    return events


@pytest.fixture(scope="module")
def recording(clips):
    noise = np.random.default_rng(3).normal(0, 0.01, 12_345).astype(np.float32)
    return np.concatenate([clips[0], noise, clips[1], clips[2], np.zeros(20_000, "f4"), clips[3]])


@settings(max_examples=15)
@given(data=st.data())
def test_events_do_not_depend_on_how_the_frames_arrive(data, recording):
    groups = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=8))
    flushes = sorted(data.draw(st.sets(st.integers(1, len(recording) - 1), max_size=3)))
    assert cut(recording, groups, flushes) == cut(recording, [1000], flushes)


@settings(max_examples=15)
@given(data=st.data())
def test_what_is_flushed_is_cut_apart_from_what_follows(data, recording):
    flush = data.draw(st.integers(1, len(recording) - 1))
    both = windows_of(cut(recording, [100], [flush]))
    first, second = recording[:flush], recording[flush:]
    apart = [(w.start, w.end) for w in windows_of(cut(first, [100]))]
    apart += [(w.start + flush, w.end + flush) for w in windows_of(cut(second, [100]))]
    assert [(w.start, w.end) for w in both] == apart


def test_recordings_are_found_whole(clips, recording):
    windows = windows_of(cut(recording, [10], options=SegmentationOptions()))
    assert 3 <= len(windows) <= 5
    for window in windows:
        assert np.abs(recording[window.start : window.end]).max() > 0.1


@pytest.mark.parametrize("n_samples", [1, 511, 512, 513, 60_000, 64_000, 300_001])
def test_without_detection_the_windows_are_all_of_the_audio(n_samples):
    audio = np.random.default_rng(4).normal(0, 0.1, n_samples).astype(np.float32)
    options = SegmentationOptions(endpoint_s=None, min_speech_s=0.0, max_window_s=4.0)
    windows = windows_of(cut(audio, [7], detects_speech=False, options=options))
    assert [w.start for w in windows] == [0, *(w.end for w in windows[:-1])]
    assert windows[-1].end == n_samples


def test_an_endpoint_in_a_frame_that_is_filled_up_is_the_end_of_the_audio(monkeypatch):
    class Detector:
        def __init__(self):
            self.left = iter([SPEECH] + [SILENCE] * 3)

        def probabilities(self, samples):
            return [next(self.left) for _ in range(0, len(samples), FRAME_SAMPLES)]

    monkeypatch.setattr(segmentation, "VoiceActivityDetector", Detector)
    audio = np.zeros(4 * FRAME_SAMPLES - 1, dtype=np.float32)
    options = SegmentationOptions(endpoint_s=0.1, min_speech_s=0.0, padding_s=0.1)
    [window] = windows_of(cut(audio, [1], options=options))
    assert (window.reason, window.end) == ("endpoint", len(audio))


def test_flushing_nothing_gives_nothing():
    cutter = Cutter(SegmentationOptions(), True)
    empty = np.zeros(0, dtype=np.float32)
    assert cutter.flush(empty) == cutter.flush(empty) == []
    assert cutter.push(empty) == []
    assert cutter.position == 0
