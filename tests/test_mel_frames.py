"""Frames of a recording that is read little by little: their bits, their bounds, their thread."""

import os
import threading

import numpy as np
import pytest

from speechrnt import AudioError, AudioFileError, _mel
from speechrnt.mel_frames import MelFrames

RATE = 16_000
EVERYTHING = 10**9


def noise(samples):
    return np.random.default_rng(samples).standard_normal(samples, dtype=np.float32)


class Blocks:
    """An iterator over the samples that counts what was read, by which threads, and can stop."""

    def __init__(self, samples, size=RATE):
        self.samples = samples
        self.size = size
        self.read = 0
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def __iter__(self):
        return self

    def __next__(self):
        assert self.gate.wait(60)
        if self.read >= len(self.samples):
            raise StopIteration
        block = self.samples[self.read : self.read + self.size]
        self.read += len(block)
        self.threads.add(threading.current_thread())
        return block


@pytest.mark.parametrize("size", [37, 160, 4001, 30 * RATE])
@pytest.mark.parametrize("samples", [0, 1, 160, 399, 2 * RATE + 77])
@pytest.mark.parametrize("n_mels", [80, 128])
def test_the_bits_are_those_of_the_whole(samples, size, n_mels):
    audio = noise(samples)
    frames = MelFrames(Blocks(audio, size), n_mels)
    assert frames.content_up_to(EVERYTHING) == samples // 160
    expected = _mel.log10_mel(audio, n_mels)
    np.testing.assert_array_equal(frames.between(0, expected.shape[1]), expected)
    assert (frames.is_complete, frames.n_samples) == (True, samples)


def test_no_more_is_read_than_needed():
    blocks = Blocks(noise(100 * RATE))
    frames = MelFrames(blocks, 80)
    assert frames.content_up_to(1000) == 1000
    assert blocks.read <= 11 * RATE
    frames.between(500, 1500)
    assert blocks.read <= 16 * RATE
    assert not frames.is_complete


def test_what_is_forgotten_takes_no_memory_and_the_rest_is_right():
    audio = noise(300 * RATE)
    expected = _mel.log10_mel(audio)
    frames = MelFrames(Blocks(audio), 80)
    most = 0
    for first in range(0, 29_000, 700):
        frames.forget(first)
        np.testing.assert_array_equal(
            frames.between(first, first + 1000), expected[:, first : first + 1000]
        )
        most = max(most, frames._rows.shape[1])
    assert most < 4000


def test_what_is_skipped_takes_no_memory():
    frames = MelFrames(Blocks(noise(300 * RATE)), 80)
    frames.forget(29_000)
    assert frames.between(29_000, 29_100).shape == (80, 100)
    assert frames._rows.shape[1] < 2000


def test_what_was_handed_out_stays_as_it_is():
    frames = MelFrames(Blocks(noise(60 * RATE)), 80)
    part = frames.between(100, 200)
    before = part.copy()
    frames.forget(3000)
    frames.between(3000, 5000)
    np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize(("first", "past"), [(50, 150), (900, 1100)])
def test_forgotten_and_missing_frames_are_an_error(first, past):
    frames = MelFrames(Blocks(noise(10 * RATE)), 80)
    frames.forget(100)
    with pytest.raises(IndexError, match=f"{first} to {past}"):
        frames.between(first, past)


class TestPrefetch:
    def test_frames_are_ready_before_they_are_asked_for(self):
        audio = noise(60 * RATE)
        blocks = Blocks(audio)
        frames = MelFrames(blocks, 80, ahead=True)
        frames.prefetch(3000)
        frames._pending.result(60)
        read = blocks.read
        assert 30 * RATE <= read <= 32 * RATE
        blocks.gate.clear()  # whoever reads now waits
        expected = _mel.log10_mel(audio)[:, :3000]
        np.testing.assert_array_equal(frames.between(0, 3000), expected)
        assert threading.current_thread() not in blocks.threads
        blocks.gate.set()
        frames.close()

    def test_who_asks_too_early_waits(self):
        audio = noise(60 * RATE)
        blocks = Blocks(audio)
        blocks.gate.clear()
        frames = MelFrames(blocks, 80, ahead=True)
        frames.prefetch(3000)
        timer = threading.Timer(0.1, blocks.gate.set)
        timer.start()
        np.testing.assert_array_equal(frames.between(0, 3100), _mel.log10_mel(audio)[:, :3100])
        timer.join()
        frames.close()

    def test_no_thread_where_there_is_nothing_left(self):
        frames = MelFrames(Blocks(noise(RATE)), 80, ahead=True)
        frames.content_up_to(3000)
        frames.prefetch(3000)
        assert frames._executor is None

    def test_no_thread_where_none_is_wanted(self):
        blocks = Blocks(noise(60 * RATE))
        frames = MelFrames(blocks, 80)
        frames.prefetch(3000)
        assert (blocks.read, frames._executor) == (0, None)

    def test_frames_are_computed_by_who_asks_where_no_thread_can_be_started(self, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        audio = noise(60 * RATE)
        blocks = Blocks(audio)
        frames = MelFrames(blocks, 80, ahead=True)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        frames.prefetch(3000)
        frames.prefetch(3000)
        np.testing.assert_array_equal(frames.between(0, 3100), _mel.log10_mel(audio)[:, :3100])
        assert blocks.threads == {threading.current_thread()}
        frames.close()

    def test_what_goes_wrong_on_the_thread_is_raised_by_who_asks(self):
        def blocks():
            yield noise(RATE)
            raise AudioFileError("cannot be read")

        released = []
        frames = MelFrames(blocks(), 80, True, lambda: released.append(1))
        frames.content_up_to(1)
        frames.prefetch(3000)
        for _ in range(2):
            with pytest.raises(AudioFileError):
                frames.content_up_to(1)
        frames.close()
        assert released == [1]


class TestClose:
    def test_the_blocks_are_released_at_their_end(self):
        released = []
        frames = MelFrames(Blocks(noise(RATE)), 80, release=lambda: released.append(1))
        frames.content_up_to(50)
        assert released == []
        frames.content_up_to(200)
        assert released == [1]
        frames.close()
        assert released == [1]

    def test_closing_ends_the_reading_and_the_thread(self):
        released = []
        blocks = Blocks(noise(60 * RATE))
        frames = MelFrames(blocks, 80, True, lambda: released.append(blocks.read))
        before = set(threading.enumerate())
        blocks.gate.clear()
        frames.prefetch(5000)
        [thread] = set(threading.enumerate()) - before
        timer = threading.Timer(0.1, blocks.gate.set)
        timer.start()
        frames.close()  # waits for the block that is being read, and for no other
        timer.join()
        assert not thread.is_alive()
        assert blocks.read <= 2 * RATE
        assert released == [blocks.read]
        assert not frames.is_complete
        with pytest.raises(IndexError):
            frames.between(0, 10)
        frames.close()
        assert released == [blocks.read]

    def test_the_thread_itself_may_close(self):
        """It may happen to collect the garbage that the owner is part of."""
        released = []

        class Closing(Blocks):
            def __next__(self):
                block = super().__next__()
                if threading.current_thread() is not main:
                    frames.close()
                    assert released == []  # not while this block is being read
                return block

        main = threading.current_thread()
        blocks = Closing(noise(9 * RATE))
        frames = MelFrames(blocks, 80, True, lambda: released.append(1))
        blocks.gate.clear()
        frames.prefetch(800)
        executor = frames._executor
        blocks.gate.set()
        executor.shutdown()
        assert released == [1]

    def test_after_an_error_nothing_more_is_read(self):
        def blocks():
            yield noise(RATE)
            raise KeyboardInterrupt

        frames = MelFrames(blocks(), 80)
        with pytest.raises(KeyboardInterrupt):
            frames.content_up_to(1000)
        with pytest.raises(AudioFileError, match="any further"):
            frames.content_up_to(1000)
        assert not frames.is_complete


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_leaves_the_parent_alone():
    audio = noise(60 * RATE)
    blocks = Blocks(audio)
    blocks.gate.clear()
    frames = MelFrames(blocks, 80, ahead=True)
    frames.prefetch(3000)
    child = os.fork()
    if not child:
        try:
            frames.content_up_to(10)
        except AudioError:
            frames.close()
            os._exit(3)
        finally:
            os._exit(1)
    blocks.gate.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    np.testing.assert_array_equal(frames.between(0, 3100), _mel.log10_mel(audio)[:, :3100])
    frames.close()
