"""Many short streams, one after the other and some at once, and what they leave behind.

    python perf/soak_streams.py [--streams N] [--at-once N] [--idle N]

Streams take turns in what they do: speak and be finalized, at once or in pieces; stay silent; speak
in a telephone's encoding; be cancelled at some moment; have a callback that raises; be read by a
coroutine that leaves. Every text is compared with the first one of its kind. At the end, `--idle`
streams stay open, for the memory that each of them takes.

Ends with status 1 if the bytes that are allocated, or the Python objects, are more in the second
half than they ever were in the first, beyond what a cache may hold; with another C library than
glibc, nothing but Python objects is judged. Resident memory is shown, but not judged: where an
allocator finds its next block, and what it keeps of those that are free, moves it by megabytes
either way.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS))

from memory_helpers import allocated_bytes  # noqa: E402

from speechrnt import Audio, OptimizationConfig, PerformanceOptimizedSTT, load_audio  # noqa: E402
from speechrnt.system import resident_memory  # noqa: E402

SAMPLES = TESTS / "samples"
MOST_BYTES = 1 << 20
MOST_OBJECTS = 300
WAIT_S = 120
MIB = 1 << 20


class Soak:
    """Streams of all kinds, and what they should come to."""

    def __init__(self, stt):
        self.stt = stt
        manifest = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
        clips = sorted(manifest, key=lambda clip: clip["seconds"])[:8]
        self.clips = [(load_audio(SAMPLES / clip["file"]).samples, clip["lang"]) for clip in clips]
        self.texts = {}
        self.pending = deque()
        self.kinds = [
            *(self.speak, self.speak_in_pieces, self.telephone),
            *(self.silent, self.cancel, self.raising, self.leave),
        ]

    def start(self, number):
        """Start a stream, and note what it should come to."""
        kind = self.kinds[number % len(self.kinds)]
        kind(number // len(self.kinds))

    def expect(self, key, future):
        self.pending.append((key, future))

    def settle(self, n_left):
        """Wait until no more than so many streams are left."""
        while len(self.pending) > n_left:
            key, future = self.pending.popleft()
            text = future.result(WAIT_S).text
            if self.texts.setdefault(key, text) != text:
                raise AssertionError(f"{key}: {text!r} is not {self.texts[key]!r}")

    def speak(self, number):
        index = number % len(self.clips)
        samples, language = self.clips[index]
        stream = self.stt.stream(language=language)
        stream.push(samples)
        self.expect(index, stream.finalize())

    def speak_in_pieces(self, number):
        index = number % len(self.clips)
        samples, language = self.clips[index]
        stream = self.stt.stream(language=language)
        for piece in np.array_split(samples, 15):
            stream.push(piece)
        self.expect(index, stream.finalize())

    def telephone(self, number):
        index = number % len(self.clips)
        samples, language = self.clips[index]
        data = (samples[::2] * 2**15).astype("<i2").tobytes()
        stream = self.stt.stream(language=language, sample_rate=8000, partials=False)
        for at in range(0, len(data), 3201):
            stream.push(data[at : at + 3201])
        self.expect(("telephone", index), stream.finalize())

    def silent(self, number):
        stream = self.stt.stream()
        stream.push(np.zeros(16_000 + number % 1000, np.float32))
        self.expect("silence", stream.finalize())

    def cancel(self, number):
        samples, language = self.clips[number % len(self.clips)]
        stream = self.stt.stream(language=language)
        stream.push(samples[: number * 997 % len(samples)])
        if number % 2:
            stream.finalize()
        stream.cancel()

    def raising(self, number):
        samples, language = self.clips[number % len(self.clips)]
        stream = self.stt.stream(language=language, callback=lambda _: 1 / 0)
        stream.push(samples)
        self.expect(number % len(self.clips), stream.finalize())

    def leave(self, number):
        samples, language = self.clips[number % len(self.clips)]

        async def read():
            async with self.stt.stream(language=language) as stream:
                await stream.apush(samples)
                async for _ in stream:
                    break

        asyncio.run(read())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--idle", type=int, default=1000)
    options = parser.parse_args()
    # Of the callbacks that raise.
    logging.getLogger("speechrnt").setLevel(logging.CRITICAL)
    config = OptimizationConfig(
        max_concurrent_utterances=max(options.idle, 2 * options.at_once + 1),
        cleanup_interval_s=0.1,
    )
    with PerformanceOptimizedSTT(config) as stt:
        ok = soak(stt, options.streams, options.at_once)
        idle(stt, options.idle)
    sys.exit(not ok)


def soak(stt, n_streams, at_once):
    """Run the streams, and tell whether they left nothing behind."""
    run = Soak(stt)
    started = time.monotonic()
    readings = []
    print("streams       RSS  allocated  buffers  Python objects")
    for number in range(n_streams):
        run.start(number)
        run.settle(at_once)
        if (number + 1) % max(n_streams // 20, 1) == 0:
            run.settle(0)
            gc.collect()
            rss, allocated = resident_memory(), allocated_bytes()
            in_use = stt.statistics().audio_buffers.in_use
            objects = len(gc.get_objects())
            readings.append((allocated, objects))
            print(
                f"{number + 1:7d} {rss / MIB:5.1f} MiB {allocated / MIB:6.2f} MiB {in_use:8d} "
                f"{objects:15d}",
                flush=True,
            )
    seconds = time.monotonic() - started
    half = len(readings) // 2
    n_bytes, n_objects = (
        max(of_kind[half:]) - max(of_kind[:half]) for of_kind in zip(*readings, strict=True)
    )
    print(
        f"{n_streams} streams in {seconds:.0f} s; second half: {n_bytes / MIB:+.2f} MiB allocated, "
        f"{n_objects:+d} objects"
    )
    deadline = time.monotonic() + WAIT_S
    while stt.statistics().streams.open and time.monotonic() < deadline:
        time.sleep(0.01)
    statistics = stt.statistics()
    assert statistics.streams.open == 0
    assert statistics.audio_buffers.in_use == 0
    print({name: count for name, count in statistics.streams.counts.items() if count})
    return n_bytes <= MOST_BYTES and n_objects <= MOST_OBJECTS


def idle(stt, n_streams):
    """Show what an idle stream takes, in resident memory."""
    for rate in (16_000, 8_000, 44_100):
        give_back()
        before = resident_memory()
        streams = [stt.stream(sample_rate=rate, idle_timeout_s=None) for _ in range(n_streams)]
        piece = Audio.from_array(np.zeros(rate // 10, np.float32)).samples
        for stream in streams:
            for _ in range(6):
                stream.push(piece)
        time.sleep(2.0)
        give_back()
        taken = (resident_memory() - before) / max(n_streams, 1)
        audio = sum(stream._samples.nbytes for stream in streams) / max(n_streams, 1)
        print(
            f"{n_streams} idle streams at {rate} Hz: {taken / 1024:.1f} KiB of RSS each, "
            f"{audio / 1024:.1f} of them audio"
        )
        for stream in streams:
            stream.cancel()
        while stt.statistics().streams.open:
            time.sleep(0.01)


def give_back():
    """Have the allocator keep nothing that is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
