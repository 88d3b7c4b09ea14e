"""Word error rate of pico through speechrnt and through faster-whisper.

Prints a table: a row per set of recordings, a column per way of decoding (beam 5, temperature 0,
language detected). With the encoder's full context both sides must give the same text, or the exit
status is 1. The human digits are looked for beside the repository and left out if they are not
there.
"""

import json
import re
import sys
from pathlib import Path

import faster_whisper
import jiwer

import speechrnt

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "tests" / "samples"
HUMAN = ROOT.parent / "shared" / "audio"


def words(text):
    """Return the text as words without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def word_error_rate(clips, texts):
    """Return the share of wrong words."""
    return jiwer.wer([words(clip["text"]) for clip in clips], [words(text) for text in texts])


def transcribe(model, folder, clips, **options):
    """Return the text of every clip."""
    texts = []
    for clip in clips:
        segments, _ = model.transcribe(str(folder / clip["file"]), temperature=0.0, **options)
        texts.append("".join(segment.text for segment in segments))
    return texts


def main():
    """Print the table; return the exit status."""
    manifest = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
    sets = {
        f"samples, {lang}": (SAMPLES, [clip for clip in manifest if clip["lang"] == lang])
        for lang in ("en", "de", "es", "fr")
    }
    sets["samples, all"] = (SAMPLES, manifest)
    if HUMAN.is_dir():
        digits = json.loads((HUMAN / "manifest.json").read_text(encoding="utf-8"))["digits"]
        sets["human digits"] = (HUMAN, digits)

    ours = speechrnt.WhisperModel("pico", device="cpu")
    peer = faster_whisper.WhisperModel(speechrnt.download_model("pico"), device="cpu")
    print("| recordings | clips | faster-whisper | speechrnt, full context | speechrnt, auto |")
    print("|---|---|---|---|---|")
    same = True
    for name, (folder, clips) in sets.items():
        expected = transcribe(peer, folder, clips)
        full = transcribe(ours, folder, clips, audio_context="full")
        auto = transcribe(ours, folder, clips, audio_context="auto")
        same = same and full == expected
        rates = (f"{word_error_rate(clips, texts):.1%}" for texts in (expected, full, auto))
        print(f"| {name} | {len(clips)} | {' | '.join(rates)} |")
    print(f"\nfull context: the texts are {'the same' if same else 'NOT the same'} on both sides")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
