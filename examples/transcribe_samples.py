"""Transcribe the recordings that come with the repository: text, time taken, real-time factor."""

import json
import time
from pathlib import Path

from speechrnt import WhisperModel

SAMPLES = Path(__file__).parent.parent / "tests" / "samples"


def main() -> None:
    """Print a line per recording, and the totals."""
    clips = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
    started = time.perf_counter()
    model = WhisperModel("pico", device="cpu")
    print(f"model pico loaded in {time.perf_counter() - started:.2f} s")
    # The first call starts the threads of the model.
    list(model.transcribe(SAMPLES / clips[0]["file"])[0])

    audio_s = taken_s = 0.0
    for clip in clips:
        started = time.perf_counter()
        segments, info = model.transcribe(SAMPLES / clip["file"])
        text = "".join(segment.text for segment in segments).strip()
        taken = time.perf_counter() - started
        audio_s += info.duration
        taken_s += taken
        mark = " " if text == clip["text"] else "*"
        print(f"{clip['file']}  {info.language}  {taken * 1000:5.0f} ms {mark} {text}")
        if text != clip["text"]:
            print(f"{'':29}  said: {clip['text']}")
    print(
        f"{len(clips)} recordings, {audio_s:.1f} s of audio in {taken_s:.2f} s: "
        f"real-time factor {taken_s / audio_s:.3f}, {audio_s / taken_s:.0f} times real time"
    )


if __name__ == "__main__":
    main()
