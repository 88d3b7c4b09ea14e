"""Transcripts as text, JSON and subtitles, read back by the rules of each format."""

import io
import json
import re
from html import unescape
from types import SimpleNamespace

import faster_whisper
import pytest
from hypothesis import given
from hypothesis import strategies as st

import speechrnt
from speechrnt.formats import WRITERS, format_timestamp
from speechrnt.results import Segment, TranscriptionInfo, Word

INFO = TranscriptionInfo(
    language="de",
    language_probability=0.75,
    duration=12.5,
    duration_after_vad=12.5,
    all_language_probs=None,
    transcription_options=SimpleNamespace(),
    vad_options=None,
    warnings=("the file is truncated",),
)


def segment(number, start, end, text, words=None) -> Segment:
    return Segment(number, 0, start, end, text, [1, 2], -0.25, 1.5, 0.01, words, 0.0)


TRANSCRIPTS = {
    "nothing": [],
    "one": [segment(1, 0.0, 1.5, " Öffne das Fenster.")],
    "three": [
        segment(1, 0.0, 1.5, " Two five one."),
        segment(2, 1.5, 59.9996, " こんにちは 👋"),
        segment(3, 3600.25, 3661.0, " ¿Qué?"),
    ],
    "marks": [segment(1, 0.0, 1.0, " a --> b <i> & c"), segment(2, 1.0, 2.0, " 00:01 --> 00:02")],
    "lines": [segment(1, 0.0, 1.0, " first\n\n \nsecond \r\n third\n"), segment(2, 1.0, 2.0, " 7")],
    "before_the_start": [segment(1, -0.02, 1.0, " early")],
}


def written(name, form) -> str:
    file = io.StringIO()
    WRITERS[form](iter(TRANSCRIPTS[name]), INFO, file)
    return file.getvalue()


def lines(text) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def seconds(timestamp) -> float:
    hours, minutes, rest = timestamp.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def parse_srt(text):
    """Return number, start, end and lines of each subtitle."""
    cues = []
    for block in text.split("\n\n"):
        if block.strip():
            number, times, *content = block.strip("\n").split("\n")
            match = re.fullmatch(r"(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})", times)
            assert "-->" not in "".join(content)
            cues.append((int(number), seconds(match[1]), seconds(match[2]), content))
    return cues


def parse_vtt(text):
    """Return start, end and lines of each cue."""
    header, *blocks = text.split("\n\n")
    assert header == "WEBVTT"
    cues = []
    for block in blocks:
        if block.strip():
            times, *content = block.strip("\n").split("\n")
            match = re.fullmatch(r"(\d\d:\d\d:\d\d\.\d{3}) --> (\d\d:\d\d:\d\d\.\d{3})", times)
            assert not re.search("-->|<|&(?!amp;|lt;|gt;)", "".join(content))
            cues.append((seconds(match[1]), seconds(match[2]), [unescape(c) for c in content]))
    return cues


# Times


@pytest.mark.parametrize(
    ("time", "always", "marker", "expected"),
    [
        (0, False, ".", "00:00.000"),
        (0, True, ".", "00:00:00.000"),
        (0.0004, False, ".", "00:00.000"),
        (0.0006, False, ".", "00:00.001"),
        (1.5, True, ",", "00:00:01,500"),
        (59.9994, False, ".", "00:59.999"),
        (59.9996, False, ".", "01:00.000"),
        (3599.9996, False, ".", "01:00:00.000"),
        (3600, False, ".", "01:00:00.000"),
        (3661.25, False, ",", "01:01:01,250"),
        (360_000, False, ".", "100:00:00.000"),
    ],
)
def test_a_time_is_written(time, always, marker, expected):
    assert format_timestamp(time, always, marker) == expected
    assert speechrnt.format_timestamp(time, always, marker) == expected


@given(st.floats(0, 1e7), st.booleans(), st.sampled_from([".", ","]))
def test_any_time_is_written_as_in_faster_whisper(time, always, marker):
    theirs = faster_whisper.format_timestamp(time, always, marker)
    assert format_timestamp(time, always, marker) == theirs


@pytest.mark.parametrize("time", [-0.001, -1, float("-inf")])
def test_a_negative_time_is_a_value_error(time):
    with pytest.raises(ValueError, match="must not be negative"):
        format_timestamp(time)


# Formats


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_text_is_a_line_per_segment(name):
    expected = [" ".join(lines(segment.text)) for segment in TRANSCRIPTS[name]]
    text = written(name, "text")
    assert text.splitlines() == expected
    assert text == "".join(line + "\n" for line in expected)


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_json_is_one_line_that_holds_everything(name):
    text = written(name, "json")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    document = json.loads(text)
    assert document["language"] == "de"
    assert document["language_probability"] == 0.75
    assert document["duration"] == 12.5
    assert document["warnings"] == ["the file is truncated"]
    segments = TRANSCRIPTS[name]
    assert document["text"] == "".join(segment.text for segment in segments).strip()
    assert [Segment(**record) for record in document["segments"]] == segments


def test_json_holds_the_words():
    words = [Word(0.0, 0.5, " Two", 0.9)]
    file = io.StringIO()
    WRITERS["json"]([segment(1, 0.0, 0.5, " Two", words)], INFO, file)
    [record] = json.loads(file.getvalue())["segments"]
    assert record["words"] == [{"start": 0.0, "end": 0.5, "word": " Two", "probability": 0.9}]


@pytest.mark.parametrize(
    ("encoding", "readable"),
    [("utf-8", True), ("UTF8", True), ("ascii", False), ("latin-1", False), ("cp1252", False)],
)
def test_json_is_valid_in_every_encoding(encoding, readable):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    WRITERS["json"](TRANSCRIPTS["three"], INFO, file)
    file.flush()
    document = json.loads(raw.getvalue().decode(encoding))
    assert document["text"] == "Two five one. こんにちは 👋 ¿Qué?"
    assert ("こんにちは" in raw.getvalue().decode(encoding)) == readable


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_srt_reads_back(name):
    text = written(name, "srt")
    assert parse_srt(text) == [
        (
            segment.id,
            max(round(segment.start, 3), 0),
            round(segment.end, 3),
            [line.replace("-->", "->") for line in lines(segment.text)],
        )
        for segment in TRANSCRIPTS[name]
    ]


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_vtt_reads_back(name):
    assert parse_vtt(written(name, "vtt")) == [
        (max(round(segment.start, 3), 0), round(segment.end, 3), lines(segment.text))
        for segment in TRANSCRIPTS[name]
    ]


@given(st.text())
def test_any_text_leaves_subtitles_readable(text):
    segments = [segment(1, 0.0, 1.0, text), segment(2, 1.0, 2.0, " after")]
    for form, parse in (("srt", parse_srt), ("vtt", parse_vtt)):
        file = io.StringIO()
        WRITERS[form](segments, INFO, file)
        assert [cue[-1] for cue in parse(file.getvalue())][1:] == [["after"]]


def test_subtitles_begin_as_their_formats_ask():
    assert written("one", "srt") == ("1\n00:00:00,000 --> 00:00:01,500\nÖffne das Fenster.\n\n")
    assert written("one", "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nÖffne das Fenster.\n\n"
    )
    assert written("nothing", "srt") == ""
    assert written("nothing", "vtt") == "WEBVTT\n\n"


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_segments_are_written_as_they_come(form):
    file = io.StringIO()

    def segments():
        yield segment(1, 0.0, 1.0, " first")
        assert "first" in file.getvalue()
        yield segment(2, 1.0, 2.0, " second")

    WRITERS[form](segments(), INFO, file)
    assert "second" in file.getvalue()
