"""The log-mel front end, against faster-whisper's and against the specification in float64."""

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechrnt import _mel
from speechrnt.errors import InvalidAudioError, OptionError

SAMPLE_RATE = 16000
SPEECH = sorted((Path(__file__).parent / "samples").glob("*.wav"))
EDGE_LENGTHS = [0, 1, 2, 39, 40, 41, 119, 120, 121, 159, 160, 161, 199, 200, 201, 319, 320, 359]
EDGE_LENGTHS += [360, 361, 399, 400, 401, 559, 560, 561, 2679, 2680, 2681, 2760, 2880, 3040]
INSTRUCTION_SETS = ["avx512", "avx2", "sse2", "neon", "generic"]


def load_reference():
    """Faster-whisper's front end alone: its package imports every inference dependency."""
    package = importlib.util.find_spec("faster_whisper")
    path = Path(package.origin).with_name("feature_extractor.py")
    spec = importlib.util.spec_from_file_location("feature_extractor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FeatureExtractor


FeatureExtractor = load_reference()
REFERENCE = {n_mels: FeatureExtractor(feature_size=n_mels) for n_mels in (80, 128)}

both_channel_counts = pytest.mark.parametrize("n_mels", [80, 128])


def noise(n_samples, seed=0, level=0.1):
    samples = np.random.default_rng(seed).standard_normal(n_samples)
    return (level * samples).astype(np.float32)


def read_wav(path):
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def sine(hz, seconds=3.0):
    return np.sin(2 * np.pi * hz * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)


def impulse(at, n_samples=SAMPLE_RATE):
    samples = np.zeros(n_samples, dtype=np.float32)
    samples[at] = 1.0
    return samples


def mel_filters(n_mels):
    """Triangles of unit area on Slaney's scale, by interpolation between their corners."""
    mels = np.linspace(0.0, 45.245640471924965, n_mels + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.arange(201) * 40.0
    return np.stack(
        [
            np.interp(bins, corners[i : i + 3], [0.0, 2 / (corners[i + 2] - corners[i]), 0.0])
            for i in range(n_mels)
        ]
    )


def specification(pcm, n_mels):
    """Unnormalized log10 mel in float64, from the definition of the discrete Fourier transform."""
    n_frames = len(pcm) // 160 + 1
    samples = np.abs(160 * np.arange(n_frames)[:, None] - 200 + np.arange(400))
    padded = np.append(pcm.astype(np.float64), np.zeros(400))
    framed = padded[np.minimum(samples, len(pcm))]
    turns = np.outer(np.arange(400), np.arange(201)) / 400
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs((framed * window) @ np.exp(-2j * np.pi * turns)) ** 2
    return np.log10(np.maximum(mel_filters(n_mels) @ power.T, 1e-10))


def whisper_units(log10_mel):
    return (np.maximum(log10_mel, log10_mel.max() - 8) + 4) / 4


def assert_equal_to_rounding(actual, expected):
    """Equality up to the rounding of a float32 transform, which dips far below the maximum show."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected)
    assert error.max() <= 1e-4
    assert error.mean() <= 1e-6


def stream_frames(pcm, sizes, n_mels=80):
    """Frames of `pcm` pushed in pieces of the given sizes, and the rest at once."""
    mel = _mel.IncrementalLogMel(n_mels)
    pieces = []
    start = 0
    for size in [*sizes, len(pcm)]:
        pieces.append(mel.push(pcm[start : start + size]))
        start += size
    pieces.append(mel.finish())
    return np.concatenate(pieces, axis=1)


def run_python(code, *arguments, **environment):
    """Run `code` in a process that imports from where this one does."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


class TestParity:
    @pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.stem)
    @both_channel_counts
    def test_speech(self, path, n_mels):
        pcm = read_wav(path)
        assert_equal_to_rounding(_mel.log_mel(pcm, n_mels), REFERENCE[n_mels](pcm))

    @pytest.mark.parametrize(
        "pcm",
        [
            pytest.param(noise(80000, level=1.0), id="loud_noise"),
            pytest.param(noise(80000, level=1e-4), id="faint_noise"),
            pytest.param(np.zeros(48000, np.float32), id="silence"),
            pytest.param(np.full(48000, 0.5, np.float32), id="dc"),
            pytest.param(np.sign(sine(440)).astype(np.float32), id="clipping_square"),
            pytest.param(sine(997).astype(np.float32), id="sine"),
            pytest.param(impulse(0), id="impulse_at_start"),
            pytest.param(impulse(199), id="impulse_at_edge"),
            pytest.param(impulse(SAMPLE_RATE - 1), id="impulse_at_end"),
        ],
    )
    @both_channel_counts
    def test_synthetic(self, pcm, n_mels):
        assert_equal_to_rounding(_mel.log_mel(pcm, n_mels), REFERENCE[n_mels](pcm))

    @pytest.mark.parametrize("n_samples", EDGE_LENGTHS)
    @both_channel_counts
    def test_every_edge(self, n_samples, n_mels):
        pcm = noise(n_samples, seed=n_samples)
        assert_equal_to_rounding(_mel.log_mel(pcm, n_mels), REFERENCE[n_mels](pcm))

    def test_ten_minutes(self):
        pcm = noise(600 * SAMPLE_RATE)
        assert_equal_to_rounding(_mel.log_mel(pcm), REFERENCE[80](pcm))

    @pytest.mark.parametrize("n_samples", [*EDGE_LENGTHS, 8000])
    @both_channel_counts
    def test_specification_in_float64(self, n_samples, n_mels):
        pcm = noise(n_samples, seed=n_samples)
        expected = specification(pcm, n_mels)
        assert_equal_to_rounding(_mel.log10_mel(pcm, n_mels) / 4, expected / 4)
        assert_equal_to_rounding(_mel.log_mel(pcm, n_mels), whisper_units(expected))

    @both_channel_counts
    def test_mel_filters(self, n_mels):
        filters = _mel.mel_filters(n_mels)
        assert filters.dtype == np.float32
        np.testing.assert_allclose(filters, REFERENCE[n_mels].mel_filters, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(filters, mel_filters(n_mels), rtol=1e-6, atol=1e-9)

    def test_silence_is_exactly_the_floor(self):
        assert np.all(_mel.log10_mel(np.zeros(1000, np.float32)) == -10)
        assert np.all(_mel.log_mel(np.zeros(0, np.float32)) == -1.5)


ISA_SCRIPT = """
import sys
import numpy as np
from speechrnt import _mel

inputs, results = np.load(sys.argv[1]), {}
for name in inputs.files:
    for n_mels in (80, 128):
        single = _mel.log_mel(inputs[name], n_mels)
        half = _mel.log_mel(inputs[name], n_mels, np.empty(single.shape, np.float16))
        whole = _mel.log10_mel(inputs[name], n_mels)
        stream = _mel.IncrementalLogMel(n_mels)
        pieces = [stream.push(inputs[name][i : i + 777]) for i in range(0, inputs[name].size, 777)]
        assert np.array_equal(half, single.astype(np.float16))
        assert np.array_equal(np.concatenate([*pieces, stream.finish()], axis=1), whole)
        assert np.array_equal(_mel.normalize(whole), single)
        results[f"{name} {n_mels}"] = single
np.savez(sys.argv[2], **results)
"""


@pytest.fixture(scope="module")
def isa_results(tmp_path_factory):
    """Results of every instruction set that this machine has, by its name."""
    directory = tmp_path_factory.mktemp("instruction_sets")
    inputs = {"noise": noise(50000), "short": noise(41), "none": noise(0)}
    inputs |= {path.stem: read_wav(path) for path in SPEECH[:4]}
    np.savez(directory / "inputs.npz", **inputs)
    results = {}
    for name in INSTRUCTION_SETS:
        output = directory / f"{name}.npz"
        done = run_python(ISA_SCRIPT, directory / "inputs.npz", output, SPEECHRNT_ISA=name)
        if done.returncode == 0:
            results[name] = np.load(output)
        else:
            assert "is not available here" in done.stderr, done.stderr
    return results


class TestInstructionSets:
    """Each in a process of its own, as the choice is made at import."""

    def test_current_one_is_among_them(self, isa_results):
        assert _mel.isa() in isa_results

    def test_they_agree_to_rounding(self, isa_results):
        for results in isa_results.values():
            for name in results.files:
                assert_equal_to_rounding(results[name], isa_results[_mel.isa()][name])

    def test_environment_variable_is_obeyed(self, isa_results):
        for name in isa_results:
            done = run_python("import speechrnt._mel as m; print(m.isa())", SPEECHRNT_ISA=name)
            assert done.stdout.strip() == name

    def test_unknown_one_is_refused_with_the_choices(self, isa_results):
        done = run_python("import speechrnt._mel", SPEECHRNT_ISA="mmx")
        assert "OptionError: SPEECHRNT_ISA='mmx' is not available here" in done.stderr
        assert done.stderr.strip().endswith("choose one of: " + ", ".join(isa_results))


class TestIncremental:
    @given(data=st.data(), n_mels=st.sampled_from([80, 128]))
    @settings(max_examples=150)
    def test_any_chunking_gives_the_offline_bits(self, data, n_mels):
        pcm = noise(data.draw(st.integers(0, 6000), label="n_samples"))
        size = st.one_of(st.sampled_from([0, 1, 40, 159, 160, 161, 200, 400]), st.integers(0, 3000))
        sizes = data.draw(st.lists(size, max_size=12), label="sizes")
        assert np.array_equal(stream_frames(pcm, sizes, n_mels), _mel.log10_mel(pcm, n_mels))

    def test_every_length_to_1000(self):
        rng = np.random.default_rng(0)
        pcm = noise(1000)
        for n_samples in range(1001):
            sizes = rng.integers(0, 300, size=4)
            expected = _mel.log10_mel(pcm[:n_samples])
            assert np.array_equal(stream_frames(pcm[:n_samples], sizes), expected)

    def test_single_samples(self):
        pcm = noise(1000)
        assert np.array_equal(stream_frames(pcm, [1] * 1000), _mel.log10_mel(pcm))

    def test_pcm_that_is_not_finite_stays_in_its_frames(self):
        pcm = noise(4000)
        pcm[[200, 1700]] = np.nan, np.inf
        offline = _mel.log10_mel(pcm)
        assert np.array_equal(stream_frames(pcm, [200, 1300, 7]), offline, equal_nan=True)

    def test_frames_come_as_soon_as_they_are_final(self):
        mel = _mel.IncrementalLogMel()
        for n_samples in range(1, 1001):
            predicted = mel.frames_from_push(1)
            final = n_samples >= 200 and (n_samples - 200) % 160 == 0
            assert mel.push(impulse(0, 1)).shape == (80, predicted) == (80, int(final))
        assert (mel.samples, mel.frames) == (1000, 6)

    @pytest.mark.parametrize("n_samples", EDGE_LENGTHS)
    def test_finish_completes_the_frame_count(self, n_samples):
        mel = _mel.IncrementalLogMel()
        pushed = mel.push(noise(n_samples)).shape[1]
        rest = mel.finish().shape[1]
        assert pushed + rest == mel.frames == _mel.frame_count(n_samples) == n_samples // 160 + 1

    def test_after_finish_only_reset(self):
        mel = _mel.IncrementalLogMel()
        mel.push(noise(500))
        mel.finish()
        for forbidden in (
            lambda: mel.push(noise(10)),
            lambda: mel.frames_from_push(10),
            mel.finish,
        ):
            with pytest.raises(RuntimeError, match="reset"):
                forbidden()
        assert (mel.samples, mel.frames) == (500, 4)

    def test_reset_forgets_everything(self):
        mel = _mel.IncrementalLogMel(128)
        mel.push(noise(777, seed=1))
        mel.finish()
        mel.reset()
        assert (mel.n_mels, mel.samples, mel.frames) == (128, 0, 0)
        pcm = noise(2000, seed=2)
        frames = np.concatenate([mel.push(pcm), mel.finish()], axis=1)
        assert np.array_equal(frames, _mel.log10_mel(pcm, 128))

    def test_out_receives_the_frames(self):
        pcm = noise(5000)
        mel = _mel.IncrementalLogMel()
        frames = np.zeros((80, 32), np.float32)
        first = mel.frames_from_push(3000)
        assert mel.push(pcm[:3000], out=frames[:, :first]).base is frames
        second = mel.frames_from_push(2000)
        mel.push(pcm[3000:], frames[:, first : first + second])
        mel.finish(frames[:, first + second :])
        assert np.array_equal(frames, _mel.log10_mel(pcm))

    def test_wrong_out_changes_nothing(self):
        pcm = noise(1000)
        mel = _mel.IncrementalLogMel()
        mel.push(pcm[:500])
        with pytest.raises(ValueError, match="shape"):
            mel.push(pcm[500:], np.zeros((80, 99), np.float32))
        with pytest.raises(InvalidAudioError):
            mel.push(pcm[500:].astype(np.float64))
        with pytest.raises(ValueError, match="shape"):
            mel.finish(np.zeros((80, 99), np.float32))
        assert (mel.samples, mel.frames) == (500, 2)
        rest = np.concatenate([mel.push(pcm[500:]), mel.finish()], axis=1)
        assert np.array_equal(rest, _mel.log10_mel(pcm)[:, 2:])

    def test_threads_take_turns(self):
        mel = _mel.IncrementalLogMel()
        silence = np.zeros(1600, np.float32)
        with ThreadPoolExecutor(4) as pool:
            pieces = list(pool.map(lambda _: mel.push(silence), range(400)))
        assert mel.samples == 400 * 1600
        assert sum(piece.shape[1] for piece in pieces) == mel.frames
        assert mel.frames + mel.finish().shape[1] == _mel.frame_count(400 * 1600)

    def test_it_is_not_pickled(self):
        with pytest.raises(TypeError):
            pickle.dumps(_mel.IncrementalLogMel())


class TestCast:
    """Values as they are, in the other type."""

    def test_every_value_of_half_precision_is_exact(self):
        half = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, -1)
        wide = _mel.cast(half, np.zeros(half.shape, np.float32))
        np.testing.assert_array_equal(wide, half.astype(np.float32))
        again = _mel.cast(wide, np.zeros(half.shape, np.float16))
        np.testing.assert_array_equal(again, half)

    def test_others_are_rounded_as_numpy_does(self):
        half = np.arange(2**16, dtype=np.uint16).view(np.float16)
        half = half[np.isfinite(half)].astype(np.float32)
        between = (half[1:] + half[:-1]) / 2  # ties, and their neighbours
        values = np.stack(
            [between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf), between * 3]
        ).astype(np.float32)
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16)
        out = np.zeros(values.shape, np.float16)
        assert _mel.cast(values, out) is out
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("columns", [0, 1, 7, 8, 15, 16, 17, 33])
    def test_rows_of_any_length(self, columns):
        values = noise(3 * columns + 3)[: 3 * columns].reshape(3, columns)
        wide = np.full((3, columns + 2), 7, np.float16)
        _mel.cast(values, wide[:, 1:-1])
        np.testing.assert_array_equal(wide[:, 1:-1], values.astype(np.float16))
        assert (wide[:, [0, -1]] == 7).all()
        np.testing.assert_array_equal(_mel.cast(values, np.zeros((3, columns), np.float32)), values)
        np.testing.assert_array_equal(
            _mel.cast(values.T.copy().T, np.zeros((3, columns), np.float16)),
            values.astype(np.float16),
        )

    @pytest.mark.parametrize(
        ("values", "out", "error"),
        [
            (np.zeros((2, 3)), np.zeros((2, 3), np.float16), TypeError),
            (np.zeros((2, 3), np.float32), np.zeros((2, 3)), TypeError),
            (np.zeros((2, 3), np.float32), None, TypeError),
            ([[1.0]], np.zeros((1, 1), np.float16), TypeError),
            (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float16), ValueError),
            (np.zeros(3, np.float32), np.zeros((1, 3), np.float16), ValueError),
        ],
    )
    def test_other_arrays_are_refused(self, values, out, error):
        with pytest.raises(error, match="must"):
            _mel.cast(values, out)


class TestNormalize:
    def test_it_completes_log10_mel(self):
        pcm = noise(20000)
        assert np.array_equal(_mel.normalize(_mel.log10_mel(pcm)), _mel.log_mel(pcm))

    def test_in_place(self):
        log10 = _mel.log10_mel(noise(20000))
        expected = _mel.normalize(log10)
        assert _mel.normalize(log10, out=log10) is log10
        assert np.array_equal(log10, expected)

    def test_window_of_a_longer_signal(self):
        window = _mel.log10_mel(noise(20000))[:, 17:58]
        expected = (np.maximum(window, window.max() - np.float32(8)) + 4) / 4
        assert np.array_equal(_mel.normalize(window), expected)

    def test_given_maximum_sets_the_floor(self):
        log10 = np.array([[-9.0, 0.5, 2.0]], np.float32)
        expected = np.array([[-0.25, 1.125, 1.5]], np.float32)
        assert np.array_equal(_mel.normalize(log10, maximum=3.0), expected)

    def test_half_precision_is_rounded_once(self):
        log10 = _mel.log10_mel(noise(20000))
        half = _mel.normalize(log10, np.zeros(log10.shape, np.float16))
        assert np.array_equal(half, _mel.normalize(log10).astype(np.float16))

    def test_rows_that_are_not_contiguous_are_copied(self):
        log10 = _mel.log10_mel(noise(20000))
        assert np.array_equal(_mel.normalize(np.asfortranarray(log10)), _mel.normalize(log10))

    def test_no_frames(self):
        assert _mel.normalize(np.empty((80, 0), np.float32)).shape == (80, 0)

    @pytest.mark.parametrize(
        ("log10", "error"),
        [(np.zeros((2, 2)), TypeError), (np.zeros(2, np.float32), ValueError), (None, TypeError)],
    )
    def test_wrong_input_is_refused(self, log10, error):
        with pytest.raises(error, match="log10_mel must"):
            _mel.normalize(log10)


class TestInput:
    def test_unaligned(self):
        pcm = noise(4321)
        for offset in (1, 2, 3):
            shifted = np.frombuffer(bytes(offset) + pcm.tobytes(), np.uint8)[offset:]
            assert np.array_equal(_mel.log_mel(shifted.view(np.float32)), _mel.log_mel(pcm))
            assert np.array_equal(
                stream_frames(shifted.view(np.float32), [1234, 1]), _mel.log10_mel(pcm)
            )

    def test_not_contiguous(self):
        stereo = np.stack([noise(4000, seed=1), noise(4000, seed=2)], axis=1)
        for channel in (stereo[:, 1], stereo[::-1, 0]):
            expected = _mel.log10_mel(np.ascontiguousarray(channel))
            assert np.array_equal(_mel.log10_mel(channel), expected)
            assert np.array_equal(stream_frames(channel, [999]), expected)

    def test_any_buffer(self):
        pcm = noise(1000)
        pcm.flags.writeable = False
        expected = _mel.log_mel(pcm)
        assert np.array_equal(_mel.log_mel(memoryview(pcm)), expected)
        assert np.array_equal(_mel.log_mel(memoryview(pcm.tobytes()).cast("f")), expected)

    @pytest.mark.parametrize(
        ("pcm", "message"),
        [
            (np.zeros(10), "must be float32, not float64"),
            (np.zeros(10, np.int16), "must be float32, not int16"),
            (np.zeros(10, ">f4"), "must be float32, not >f4"),
            (np.zeros((10, 2), np.float32), r"one dimension \(mono\), not the shape \(10, 2\)"),
            (np.float32(0), "one dimension"),
            (b"12345678", "must be float32, not format 'B'"),
            ([0.0, 0.1], "must be a float32 array, not list"),
            (None, "must be a float32 array, not NoneType"),
        ],
    )
    def test_wrong_pcm_is_refused(self, pcm, message):
        for function in (_mel.log_mel, _mel.log10_mel, _mel.IncrementalLogMel().push):
            with pytest.raises(InvalidAudioError, match=message):
                function(pcm)

    @pytest.mark.parametrize("n_mels", [-1, 0, 79, 81, 129])
    def test_wrong_channel_count_is_refused(self, n_mels):
        for function in (
            _mel.IncrementalLogMel,
            lambda n_mels: _mel.log_mel(noise(10), n_mels),
            lambda n_mels: _mel.log10_mel(noise(10), n_mels),
            _mel.mel_filters,
        ):
            with pytest.raises(OptionError, match=f"must be 80 or 128, not {n_mels}"):
                function(n_mels)

    def test_negative_count_is_refused(self):
        for function in (_mel.frame_count, _mel.IncrementalLogMel().frames_from_push):
            with pytest.raises(ValueError, match="must not be negative"):
                function(-1)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_not_finite_spoils_only_its_frames(self, value, dtype):
        pcm = noise(16000)
        pcm[8000] = value
        clean = noise(16000)
        clean[8000] = 0
        out = _mel.log_mel(pcm, out=np.zeros((80, 101), dtype))
        covering = [49, 50, 51]
        assert not np.isfinite(out[:, covering]).any() or value == np.float32(3e38)
        assert np.isfinite(np.delete(out, covering, axis=1)).all()

    def test_nothing_finite(self):
        pcm = np.full(5000, np.nan, np.float32)
        assert np.isnan(_mel.log_mel(pcm)).all()
        assert np.isnan(_mel.log_mel(pcm, out=np.zeros((80, 32), np.float16))).all()


class TestOutput:
    @both_channel_counts
    def test_rows_any_distance_apart(self, n_mels):
        pcm = noise(9999)
        expected = _mel.log_mel(pcm, n_mels)
        slots = np.full((3, n_mels, 100), np.nan, np.float32)
        out = slots[1, :, 7:70]
        assert _mel.log_mel(pcm, n_mels, out) is out
        assert np.array_equal(out, expected)
        slots[1, :, 7:70] = np.nan
        assert np.isnan(slots).all()
        backwards = slots[2, ::-1, :63]
        assert np.array_equal(_mel.log_mel(pcm, n_mels, backwards), expected)

    def test_half_precision_is_rounded_once(self):
        # Quiet after loud, and near -4 in log10, where halves are subnormal.
        pcm = np.concatenate([noise(8000, level=0.3), noise(8000, level=1e-4), sine(300)])
        pcm = pcm.astype(np.float32)
        half = _mel.log_mel(pcm, out=np.zeros((80, _mel.frame_count(pcm.size)), np.float16))
        assert np.array_equal(half, _mel.log_mel(pcm).astype(np.float16))

    def test_unaligned(self):
        pcm = noise(3000)
        for dtype in (np.float32, np.float16):
            raw = np.zeros(1 + 80 * 19 * np.dtype(dtype).itemsize, np.uint8)
            out = raw[1:].view(dtype).reshape(80, 19)
            assert np.array_equal(_mel.log_mel(pcm, out=out), _mel.log_mel(pcm).astype(dtype))

    def test_any_buffer(self):
        out = bytearray(80 * 19 * 4)
        _mel.log_mel(noise(3000), out=memoryview(out).cast("f", (80, 19)))
        assert np.frombuffer(out, np.float32).tobytes() == _mel.log_mel(noise(3000)).tobytes()

    @pytest.mark.parametrize(
        ("shape", "dtype", "error"),
        [
            ((80, 18), np.float32, ValueError),
            ((80, 20), np.float16, ValueError),
            ((128, 19), np.float32, ValueError),
            ((1, 80, 19), np.float32, ValueError),
            ((80 * 19,), np.float32, ValueError),
            ((80, 19), np.float64, TypeError),
            ((80, 19), np.int32, TypeError),
        ],
    )
    def test_wrong_out_is_refused_and_left_alone(self, shape, dtype, error):
        out = np.zeros(shape, dtype)
        for function in (_mel.log_mel, _mel.log10_mel):
            with pytest.raises(error, match="out must"):
                function(noise(3000), out=out)
        assert not out.any()

    def test_read_only_out_is_refused(self):
        out = np.zeros((80, 19), np.float32)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="writable"):
            _mel.log_mel(noise(3000), out=out)
        assert not out.any()

    def test_out_with_scattered_rows_is_refused(self):
        out = np.zeros((19, 80), np.float32).T
        with pytest.raises(ValueError, match="contiguous in its last dimension"):
            _mel.log_mel(noise(3000), out=out)
        assert not out.any()

    def test_out_that_is_no_buffer_is_refused(self):
        with pytest.raises(TypeError, match="not list"):
            _mel.log_mel(noise(3000), out=[])


class TestThreads:
    def test_many_threads_at_once(self):
        signals = [noise(length, seed=length) for length in range(1000, 40000, 1000)]
        expected = [_mel.log_mel(pcm) for pcm in signals]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                for result, right in zip(pool.map(_mel.log_mel, signals), expected, strict=True):
                    assert np.array_equal(result, right)

    def test_gil_is_released(self, monkeypatch):
        # With no forced switches, another thread can only run while a call gives up the GIL.
        interval = sys.getswitchinterval()
        pcm = noise(60 * SAMPLE_RATE)
        out = np.empty((80, _mel.frame_count(pcm.size)), np.float32)
        gate = threading.Lock()
        ran = []

        def run_once():
            with gate:
                ran.append(True)

        gate.acquire()
        thread = threading.Thread(target=run_once, daemon=True)
        thread.start()
        sys.setswitchinterval(1000)
        try:
            gate.release()
            for _ in range(10000):
                _mel.log_mel(pcm, out=out)
                if ran:
                    break
        finally:
            sys.setswitchinterval(interval)
        assert ran
        thread.join()


class TestMemory:
    def test_nothing_is_allocated_beside_the_result(self):
        pcm = noise(30 * SAMPLE_RATE)
        out = np.empty((80, 3001), np.float32)
        mel = _mel.IncrementalLogMel()
        pushed, rest = np.split(out, [mel.frames_from_push(pcm.size)], axis=1)

        def use():
            _mel.log_mel(pcm, out=out)
            _mel.log10_mel(pcm, out=out)
            _mel.normalize(out, out=out)
            mel.push(pcm, out=pushed)
            mel.finish(out=rest)
            mel.reset()

        use()
        tracemalloc.start()
        try:
            for _ in range(10):
                use()
            current, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4096
        assert current < 1024
