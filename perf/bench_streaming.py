"""Streams at real-time pace: partial lag, time to final text, and word error rate.

    python perf/bench_streaming.py [--streams N ...] [--seconds S] [--rounds N]

Every stream plays recordings with pauses between them, each stream from another place on, in pieces
of 0.1 s, as fast as they were spoken. The peer does what servers around faster-whisper do: one
thread a stream, each with LocalAgreement over its buffer, one transcription at a time behind a
lock, ended by 0.5 s of silence (found by the same detector as ours). Same weights, each number of
streams in a process of its own, and the peers take turns.

- lag: from the arrival of the last audio that a partial takes into account to the partial. It is
  that of a stream whose partials keep up; a stream without partials has its audio's age for lag.
- TTFS: from the arrival of the last sample of speech to the final text, at pauses; and from
  `finalize` to the final text, for clients that know when speech has ended.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import jiwer
import numpy as np

from speechrnt import OptimizationConfig, PerformanceOptimizedSTT, load_audio
from speechrnt.audio import SAMPLE_RATE
from speechrnt.events import Final, Partial
from speechrnt.segmentation import Cutter, SegmentationOptions, WindowCut
from speechrnt.vad import FRAME_SAMPLES

SAMPLES = Path(__file__).parent.parent / "tests" / "samples"
CHUNK = SAMPLE_RATE // 10
PAUSE_S = 0.7
INTERVAL_S = 0.5
PEERS = ("faster-whisper", "speechrnt")


class Speech:
    """What one stream plays, and when each of its samples arrived."""

    def __init__(self, number, seconds):
        manifest = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
        clips = [clip for clip in manifest if clip["lang"] == "en"]
        pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
        pieces, texts, length = [], [], 0
        index = number
        while length < seconds * SAMPLE_RATE:
            clip = clips[index % len(clips)]
            index += 1
            audio = load_audio(SAMPLES / clip["file"]).samples
            pieces += [audio, pause]
            texts.append(clip["text"])
            length += len(audio) + len(pause)
        # No pause at the end: the client finalizes.
        self.samples = np.concatenate(pieces[:-1])
        self.text = " ".join(texts)
        self.started = 0.0

    def arrived(self, sample):
        """Return when a sample was pushed, by the clock that paces the pushes."""
        return self.started + -(-sample // CHUNK) * CHUNK / SAMPLE_RATE


def play(speeches, push, finish):
    """Push every stream's audio as fast as it was spoken; streams start one after the other."""
    started = time.perf_counter() + 0.2
    for number, speech in enumerate(speeches):
        speech.started = started + number * INTERVAL_S / len(speeches)
    queue = sorted(
        (speech.arrived(end), number, end)
        for number, speech in enumerate(speeches)
        for end in range(CHUNK, len(speech.samples) + CHUNK, CHUNK)
    )
    for at, number, end in queue:
        time.sleep(max(at - time.perf_counter(), 0))
        speech = speeches[number]
        push(number, speech.samples[end - CHUNK : end])
        if end >= len(speech.samples):
            finish(number)


def error_rate(speeches, texts):
    def words(text):
        return "".join(c for c in text.lower() if c.isalnum() or c == " ")

    return jiwer.wer([words(s.text) for s in speeches], [words(text) for text in texts])


def run_speechrnt(speeches):
    lags, pauses, ends, streams, finalized = [], [], [], [], {}
    config = OptimizationConfig(
        max_concurrent_utterances=max(64, len(speeches)), max_queued_requests=64
    )
    with PerformanceOptimizedSTT(config) as stt:
        stt.transcribe_async(speeches[0].samples, "en").result()

        def follow(number):
            def take(event):
                if isinstance(event, Partial):
                    arrived = speeches[number].arrived(round(event.audio_s * SAMPLE_RATE))
                    lags.append(time.perf_counter() - arrived)
                elif isinstance(event, Final) and event.ttfs_s is not None:
                    if number in finalized:
                        return
                    pauses.append(event.ttfs_s)

            return take

        streams = [stt.stream(callback=follow(n), language="en") for n in range(len(speeches))]

        def finish(number):
            began = time.perf_counter()
            finalized[number] = future = streams[number].finalize()
            future.add_done_callback(lambda _: ends.append(time.perf_counter() - began))

        play(speeches, lambda number, chunk: streams[number].push(chunk), finish)
        texts = [finalized[number].result().text for number in range(len(speeches))]
        counts = stt.statistics().streams.counts
    return lags, pauses, ends, texts, counts["revised_finals"] / max(counts["finals"], 1)


class LocalAgreement:
    """What such servers commit: what two transcripts in a row begin with, but for the last word."""

    def __init__(self):
        self.committed = 0
        self.words, self._last = [], []

    def update(self, words):
        """Take a transcript."""
        words = words[:-1]
        agreed = 0
        while agreed < min(len(words), len(self._last)) and words[agreed] == self._last[agreed]:
            agreed += 1
        if words[: self.committed] == self.words and agreed > self.committed:
            self.committed, self.words = agreed, words[:agreed]
        self._last = words

    def is_kept_by(self, words):
        """Whether a final transcript begins with what is committed."""
        return words[: self.committed] == self.words


class LockedStream:
    """A LocalAgreement loop over a model that all streams share, one at a time."""

    def __init__(self, model, lock, speech, lags, pauses, ends):
        self._model, self._lock, self._speech = model, lock, speech
        self._lags, self._pauses, self._ends = lags, pauses, ends
        self._changed = threading.Condition()
        self._received = 0
        self._finished_at = None
        self.texts = []
        self.revised = self.finals = 0
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def push(self, chunk):
        """Note that audio came."""
        with self._changed:
            self._received += len(chunk)
            self._changed.notify()

    def finish(self):
        """Note that no more will come."""
        with self._changed:
            self._finished_at = time.perf_counter()
            self._changed.notify()

    def join(self):
        """Wait for the end, and return the text."""
        self._thread.join()
        return " ".join(self.texts)

    def _transcribe(self, start, end):
        with self._lock:
            segments, _ = self._model.transcribe(
                self._speech.samples[start:end], language="en", word_timestamps=True
            )
            return " ".join(segment.text for segment in segments).split()

    def _work(self):
        cutter = Cutter(SegmentationOptions(), True)
        agreement, partial_at = LocalAgreement(), 0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._received - cutter.position >= FRAME_SAMPLES or self._finished_at
                )
                received, finished_at = self._received, self._finished_at
            position = cutter.position
            whole = received - (received - position) % FRAME_SAMPLES
            cuts = cutter.push(self._speech.samples[position:whole]) if whole > position else []
            if finished_at is not None and received >= len(self._speech.samples):
                cuts += cutter.flush(self._speech.samples[whole:received])
            for cut in cuts:
                if not isinstance(cut, WindowCut):
                    continue
                words = self._transcribe(cut.start, cut.end)
                self.texts.append(" ".join(words))
                self.finals += 1
                self.revised += not agreement.is_kept_by(words)
                agreement, partial_at = LocalAgreement(), cut.end
                if cut.reason != "end":
                    arrived = self._speech.arrived(cut.speech_end)
                    self._pauses.append(time.perf_counter() - arrived)
            if finished_at is not None and received >= len(self._speech.samples):
                self._ends.append(time.perf_counter() - finished_at)
                return
            start = cutter.segmenter.window_start
            if start is None or not cutter.segmenter.is_speech:
                continue
            if whole - max(partial_at, start) >= INTERVAL_S * SAMPLE_RATE:
                partial_at = whole
                agreement.update(self._transcribe(start, whole))
                self._lags.append(time.perf_counter() - self._speech.arrived(whole))


def run_faster_whisper(speeches):
    from faster_whisper import WhisperModel

    from speechrnt import download_model

    model = WhisperModel(download_model("pico"), device="cpu", cpu_threads=os.cpu_count())
    list(model.transcribe(speeches[0].samples[:SAMPLE_RATE], language="en")[0])
    lags, pauses, ends, lock = [], [], [], threading.Lock()
    streams = [LockedStream(model, lock, speech, lags, pauses, ends) for speech in speeches]
    play(
        speeches,
        lambda number, chunk: streams[number].push(chunk),
        lambda number: streams[number].finish(),
    )
    texts = [stream.join() for stream in streams]
    finals = sum(stream.finals for stream in streams)
    return lags, pauses, ends, texts, sum(s.revised for s in streams) / max(finals, 1)


def run_peer(peer, n_streams, seconds):
    """Measure in this process, and print what was measured."""
    speeches = [Speech(number, seconds) for number in range(n_streams)]
    cpu_started = time.process_time()
    run = run_speechrnt if peer == "speechrnt" else run_faster_whisper
    lags, pauses, ends, texts, revised = run(speeches)
    result = {
        "lag p50": float(np.quantile(lags, 0.5)) if lags else None,
        "lag p95": float(np.quantile(lags, 0.95)) if lags else None,
        "partials": len(lags) / sum(len(s.samples) for s in speeches) * SAMPLE_RATE,
        "pause p50": float(np.quantile(pauses, 0.5)),
        "pause p95": float(np.quantile(pauses, 0.95)),
        "finalize p50": float(np.quantile(ends, 0.5)),
        "finalize p95": float(np.quantile(ends, 0.95)),
        "wer": error_rate(speeches, texts),
        "revised": revised,
        "cpu": (time.process_time() - cpu_started) / seconds,
    }
    print(json.dumps(result))


def measure(peer, n_streams, seconds):
    command = [sys.executable, __file__, "--peer", peer, str(n_streams), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compare():
    """Measure all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48, 64])
    parser.add_argument("--most-peer-streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    facts = {}
    for n_streams in arguments.streams:
        peers = PEERS if n_streams <= arguments.most_peer_streams else PEERS[1:]
        rounds = [
            {peer: measure(peer, n_streams, arguments.seconds) for peer in peers}
            for _ in range(arguments.rounds)
        ]
        for peer in peers:
            facts[n_streams, peer] = {
                name: statistics.median(each[peer][name] for each in rounds)
                for name in rounds[0][peer]
                if all(each[peer][name] is not None for each in rounds)
            }
    print(f"{os.cpu_count()} cores, pico, {arguments.seconds:.0f} s a stream, median of "
          f"{arguments.rounds} round(s); times in ms\n")  # fmt: skip
    print("| streams | peer | lag p50 | p95 | partials a second | TTFS at pauses p50 | p95 "
          "| after finalize p50 | p95 | WER | revised | cores busy |")  # fmt: skip
    print("|---:|---|" + "---:|" * 10)
    for (n_streams, peer), fact in facts.items():
        times = [
            f"{fact[name] * 1e3:.0f}" if name in fact else "-"
            for name in ("lag p50", "lag p95", "pause p50", "pause p95", "finalize p50",
                         "finalize p95")
        ]  # fmt: skip
        print(
            f"| {n_streams} | {peer} | {times[0]} | {times[1]} | {fact['partials']:.2f} "
            f"| {' | '.join(times[2:])} | {fact['wer']:.1%} | {fact['revised']:.1%} "
            f"| {fact['cpu']:.2f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        run_peer(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        compare()
