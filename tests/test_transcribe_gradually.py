"""`WhisperModel` on files that are read as its windows need them."""

import dataclasses
import io
import struct
import sys
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from audio_helpers import encode, wav_bytes
from transcribe_helpers import RATE, joined, text
from waiting import eventually

import speechrnt
from speechrnt import WhisperModel
from speechrnt.features import OwnMaximumWindows
from speechrnt.models import Model


class CountingFile(io.BytesIO):
    """A file that notes how far it was read, and by which threads."""

    def __init__(self, data):
        super().__init__(data)
        self.furthest = 0
        self.threads = set()

    def read(self, size=-1):
        data = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        self.threads.add(threading.current_thread().name.split("_")[0])
        return data

    @property
    def seconds(self):
        return self.furthest / 2 / RATE


@pytest.fixture(scope="module")
def long_audio(samples, manifest):
    """English speech of two minutes."""
    audio, _ = joined(samples, manifest, 60)
    return np.tile(audio, 4)[: 120 * RATE]


@pytest.fixture(scope="module")
def long_file(long_audio, tmp_path_factory):
    """The path of `long_audio` as a WAV file."""
    path = tmp_path_factory.mktemp("long") / "long.wav"
    path.write_bytes(wav_bytes(np.round(long_audio * 32768)))
    return path


class TestGradually:
    """Files with ``normalization="window"``, which are read as the windows need them."""

    def segments(self, model, audio, **options):
        options = {"normalization": "window", "temperature": 0.0, **options}
        segments, info = model.transcribe(audio, **options)
        return [dataclasses.asdict(segment) for segment in segments], info

    @pytest.mark.parametrize(
        "options",
        [
            {"language": "en"},
            {"language_detection_segments": 3, "language_detection_threshold": None},
            {"multilingual": True, "clip_timestamps": "10,30,70,90"},
            {"language": "en", "clip_timestamps": [80.0, 95.0, 10.0, 20.5, 15.0, 40.0, 100.0]},
            {"clip_timestamps": [1000.0, 2000.0]},
            {
                "language": "en",
                "word_timestamps": True,
                "hallucination_silence_threshold": 0.5,
                "clip_timestamps": "60",
            },
            {
                "language": "en",
                "word_timestamps": True,
                "hallucination_silence_threshold": float("-inf"),
                "clip_timestamps": "90",
            },
            {"language": "en", "audio_context": "auto"},
            {"language": "en", "chunk_length": 7, "clip_timestamps": "0,10,90,120"},
        ],
    )
    @pytest.mark.parametrize("declared", [True, False])
    def test_the_result_is_that_of_the_whole_recording(
        self, model, undeclared, long_file, options, declared
    ):
        options = {"clip_timestamps": "75", **options}
        which = model if declared else undeclared
        gradual, info = self.segments(which, long_file, **options)
        whole, expected = self.segments(which, speechrnt.decode_audio(long_file), **options)
        assert gradual == whole
        assert info == expected
        assert bool(whole) is (options["clip_timestamps"] != [1000.0, 2000.0])

    def test_no_more_is_read_than_the_windows_need(self, undeclared, long_file):
        file = CountingFile(long_file.read_bytes())
        segments, info = undeclared.transcribe(file, language="en", normalization="window")
        assert info.duration == segments.duration == 120
        assert file.seconds < 10
        next(segments)
        # This window, the next, and the block that is being read.
        assert 30 < file.seconds < 70
        segments.close()
        assert file.seconds < 70
        assert not file.closed

    def test_features_of_the_next_window_are_there_when_the_model_returns(
        self, undeclared, long_file, monkeypatch
    ):
        file = CountingFile(long_file.read_bytes())
        if not undeclared._prefetches:
            monkeypatch.setattr(undeclared, "_prefetches", True)
        generate = Model.generate
        windows = []
        at = OwnMaximumWindows.at

        def recorded_at(self, seek, clip_end=sys.maxsize):
            file.threads.clear()
            window = at(self, seek, clip_end)
            windows.append((window.seek, window.frames, set(file.threads)))
            return window

        def waiting_generate(*arguments, **options):
            # The model works for as long as this takes.
            wanted = min(120, sum(windows[-1][:2]) / 100 + 30)
            eventually(lambda: file.seconds >= wanted)
            return generate(*arguments, **options)

        monkeypatch.setattr(OwnMaximumWindows, "at", recorded_at)
        monkeypatch.setattr(Model, "generate", waiting_generate)
        list(undeclared.transcribe(file, language="en", normalization="window", temperature=0.0)[0])
        assert len(windows) > 3
        here = threading.current_thread().name.split("_")[0]
        # Only the first window was read by who asked for it.
        assert windows[0][2] == {here}
        assert all(here not in threads for _, _, threads in windows[1:])

    def test_one_core_does_not_prefetch(self, monkeypatch, long_file):
        monkeypatch.setattr(speechrnt.transcribe, "usable_cores", lambda: 1)
        model = WhisperModel(device="cpu")
        file = CountingFile(long_file.read_bytes())
        options = {"language": "en", "normalization": "window", "clip_timestamps": "0,40"}
        list(model.transcribe(file, **options)[0])
        assert file.threads == {threading.current_thread().name.split("_")[0]}

    def test_parity_needs_no_thread(self, undeclared, long_file, monkeypatch):
        """All features are there before the first window."""
        monkeypatch.setattr(speechrnt.mel_frames, "ThreadPoolExecutor", None)
        options = {"language": "en", "clip_timestamps": "0,40"}
        assert text(undeclared, long_file, **options)

    def test_the_header_is_corrected_by_what_the_end_shows(self, undeclared, long_audio, caplog):
        data = wav_bytes(np.round(long_audio[: 40 * RATE] * 32768))
        cut = io.BytesIO(data[: 35 * RATE * 2])
        # What is missing shows in the header, but only decoding tells how much there is.
        whole = speechrnt.load_audio(cut)
        segments, info = undeclared.transcribe(cut, language="en", normalization="window")
        assert info.warnings == ()
        with caplog.at_level("WARNING", "speechrnt"):
            list(segments)
        assert info.warnings == whole.warnings != ()
        assert [record.getMessage() for record in caplog.records] == list(whole.warnings)
        assert info.duration == info.duration_after_vad == whole.duration
        assert segments.seconds_done == segments.duration == pytest.approx(whole.duration, abs=0.01)

    def test_a_header_that_states_too_little_is_corrected(self, undeclared, long_audio, tmp_path):
        path = encode(tmp_path / "a.flac", np.round(long_audio * 32767).astype(np.int16), "flac")
        data = bytearray(path.read_bytes())
        # The last 36 bits of these 8 bytes of STREAMINFO count the samples.
        [field] = struct.unpack_from(">Q", data, 18)
        struct.pack_into(">Q", data, 18, field >> 36 << 36 | 10 * RATE)
        segments, info = undeclared.transcribe(
            io.BytesIO(data), language="en", normalization="window", clip_timestamps="100"
        )
        assert info.duration == 10
        assert list(segments)
        assert info.duration == 120
        assert "120.00 s of audio were decoded" in info.warnings[0]

    def test_the_file_is_closed_when_nobody_needs_it(self, undeclared, long_file, monkeypatch):
        opened = []
        open_file = speechrnt.audio_file._open

        def recorded(path):
            opened.append(open_file(path))
            return opened[-1]

        monkeypatch.setattr(speechrnt.audio_file, "_open", recorded)
        options = {"language": "en", "normalization": "window"}

        def begun(**more):
            segments, _ = undeclared.transcribe(long_file, **options, **more)
            next(segments)
            return segments

        segments = begun()
        assert not opened[-1].closed
        segments.close()
        assert opened[-1].closed

        segments = begun()
        segments.cancel()
        with pytest.raises(CancelledError):
            next(segments)
        assert opened[-1].closed

        segments = begun()
        del segments
        assert opened[-1].closed

        undeclared.transcribe(long_file, **options)
        assert opened[-1].closed

        list(begun(clip_timestamps="0,20"))
        assert opened[-1].closed

        def broken(*arguments, **options):
            raise speechrnt.ModelError("broken")

        monkeypatch.setattr(Model, "encode", broken)
        with pytest.raises(speechrnt.ModelError):
            undeclared.transcribe(long_file, normalization="window")
        assert opened[-1].closed
        with pytest.raises(speechrnt.ModelError):
            begun()
        assert opened[-1].closed

    def test_a_file_closed_too_early_is_an_error(self, undeclared, long_file):
        file = io.BytesIO(long_file.read_bytes())
        segments, _ = undeclared.transcribe(file, language="en", normalization="window")
        file.close()
        with pytest.raises(speechrnt.AudioFileError, match="keep the file open"):
            list(segments)

    def test_voice_activity_detection_reads_everything_first(self, undeclared, long_file):
        file = CountingFile(long_file.read_bytes())
        undeclared.transcribe(file, language="en", normalization="window", vad_filter=True)
        assert file.seconds >= 120

    @pytest.mark.parametrize("context", ["full", "auto"])
    def test_no_audio_at_all(self, model, context):
        file = io.BytesIO(wav_bytes(np.zeros(0)))
        assert self.segments(model, file, audio_context=context)[0] == []
