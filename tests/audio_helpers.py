"""What the tests of audio files share: how to make them, and how to damage them."""

import io
import wave
from fractions import Fraction

import av
import numpy as np

from speechrnt.audio import SAMPLE_RATE

FORMATS = {
    "pcm.wav": {"codec": "pcm_s16le"},
    "stereo_44k.wav": {"codec": "pcm_s16le", "rate": 44100, "layout": "stereo"},
    "float_48k.wav": {"codec": "pcm_f32le", "rate": 48000},
    "telephone.wav": {"codec": "pcm_mulaw", "rate": 8000},
    "mono.flac": {"codec": "flac"},
    "stereo_48k.flac": {"codec": "flac", "rate": 48000, "layout": "stereo"},
    "mono_44k.mp3": {"codec": "libmp3lame", "rate": 44100},
    "stereo_8k.mp3": {"codec": "libmp3lame", "rate": 8000, "layout": "stereo"},
    "mono_44k.m4a": {"codec": "aac", "rate": 44100},
    "stereo_48k.mp4": {"codec": "aac", "rate": 48000, "layout": "stereo"},
    "opus.ogg": {"codec": "libopus", "rate": 48000},
    "vorbis.ogg": {
        "codec": "vorbis",
        "rate": 44100,
        "layout": "stereo",
        "options": {"strict": "experimental"},
    },
    "stereo.webm": {"codec": "libopus", "rate": 48000, "layout": "stereo"},
    "mono.aiff": {"codec": "pcm_s16be", "rate": 44100},
}


def encode(file, samples, codec, *, rate=SAMPLE_RATE, layout="mono", options=None, **muxer):
    """Encode int16 mono samples at 16 kHz with FFmpeg; return `file`."""
    with av.open(file, "w", **muxer) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.time_base = Fraction(1, SAMPLE_RATE)
        frame.pts = 0
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for resampled in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(resampled))
    return file


def wav_bytes(samples, rate=SAMPLE_RATE, channels=1):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def encode_all(directory, samples):
    """Encode samples once for each of `FORMATS`; return the paths by name."""
    return {name: encode(directory / name, samples, **how) for name, how in FORMATS.items()}


def with_noise_in_the_middle(data):
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(0).bytes(3000) + data[middle + 3000 :]
