"""`speechrnt stream`: recordings and PCM as they come, on pipes and terminals."""

import io
import json
import os
import subprocess

import numpy as np
import pytest
from streaming_helpers import load
from test_cli import COMMAND, ENVIRONMENT, run, run_on_terminal

from speechrnt import Audio
from speechrnt.cli import main
from speechrnt.events import Closed, Committed, Error, Final, Overload, Partial
from speechrnt.live import EventPrinter, _last_columns, pcm_chunks, recorded_chunks

FAST = ("--speed", "50")


@pytest.fixture
def recording(samples):
    return samples / "s27_en.wav"


TEXT = "What is the weather in London today?"


def stream(*arguments):
    return main(["stream", *map(str, arguments)])


class TestCommand:
    def test_a_recording_is_a_line_per_event(self, recording, capsys):
        assert stream(recording, "--speed", "4") == 0
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        assert {kind for _, kind, *_ in lines} >= {"partial", "final"}
        assert lines[-1][1:] == ["final", TEXT]
        times = [float(time) for time, *_ in lines]
        assert times == sorted(times)

    def test_each_event_as_json(self, recording, capsys):
        assert stream(recording, "--json", "--language", "en", *FAST) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert events[-1]["event"] == "Closed"
        [final] = [event for event in events if event["event"] == "Final"]
        assert final["text"] == TEXT
        assert 0 < final["start_s"] < final["end_s"] < 2.6

    @pytest.mark.parametrize(
        ("options", "step", "factor"),
        [((), 1, 2**15), (("--sample-rate", "8000"), 2, 2**15)],
    )
    def test_pcm_on_standard_input(self, recording, options, step, factor):
        data = (load(recording)[::step] * factor).astype("<i2").tobytes()
        done = subprocess.run(
            [*COMMAND, "stream", "-", *options],
            input=data,
            capture_output=True,
            env=ENVIRONMENT,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().splitlines()[-1].endswith(f"final      {TEXT}")
        assert done.stderr == b""

    def test_on_a_terminal_one_line_is_written_again(self, recording):
        status, sent, lines = run_on_terminal("stream", recording, "--speed", "4")
        assert status == 0
        assert lines == [TEXT]
        assert sent.count("\r\x1b[K") > 3
        assert "What is" in sent.split(TEXT)[0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.wav"], "nowhere.wav"),
            (["{recording}", "--speed", "0"], "--speed 0.0: must be more than 0"),
            (["{recording}", "--speed", "nan"], "must be more than 0"),
            (["{recording}", "--language", "xx"], "language"),
            (["{recording}", "--model", "none-of-these"], "none-of-these"),
            (["-", "--sample-rate", "7"], "sample rate 7"),
        ],
    )
    def test_what_cannot_be_started_is_said(self, recording, capsys, arguments, message):
        assert stream(*(each.format(recording=recording) for each in arguments)) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert message in error
        assert "Traceback" not in error

    def test_a_damaged_recording_is_transcribed_with_a_warning(self, recording, tmp_path, capsys):
        cut = tmp_path / "cut.wav"
        cut.write_bytes(recording.read_bytes()[:40_000])
        assert stream(cut, *FAST) == 0
        out, error = capsys.readouterr()
        assert "final" in out
        assert "speechrnt: warning:" in error

    def test_a_reader_that_has_left_is_no_error_worth_a_traceback(self, recording):
        ours, theirs = os.pipe()
        os.close(ours)
        status, _, error = run("stream", recording, *FAST, stdout=theirs)
        os.close(theirs)
        assert (status, error) == (1, "")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def written(events, out=None, as_json=False):
    out = out or io.StringIO()
    printer = EventPrinter(out, as_json)
    for event in events:
        printer(event)
    return out.getvalue()


class TestEventPrinter:
    def test_lines(self):
        assert written(
            [
                Partial("u", 1.0, "a", "b"),
                Committed("u", 1.0, " b"),
                Overload("u", 2.0, 4.0),
                Error("u", 3.0, "idle", "no audio", False),
                Closed("u", 3.0, "finalized"),
            ]
        ).splitlines() == [
            "    1.00  partial    a b",
            "    1.00  committed  b",
            "    2.00  overload   partials every 4 s",
            "    3.00  error      idle: no audio",
        ]

    def test_a_final_without_text_clears_the_line(self):
        final = Final("u", 1.0, "", None, "en", False, True, None)
        text = written([Partial("u", 1.0, "", "hm"), final], Terminal())
        assert text == "\r\x1b[Khm\r\x1b[K"

    def test_errors_are_lines_on_a_terminal_too(self):
        text = written([Error("u", 1.0, "stalled", "nothing", True)], Terminal())
        assert text == "\r\x1b[Kerror      stalled: nothing\n"

    def test_what_cannot_be_written_is_kept(self):
        class Full(io.StringIO):
            def write(self, text):
                raise OSError("full")

        printer = EventPrinter(Full(), False)
        printer(Partial("u", 1.0, "", "a"))
        assert str(printer.error) == "full"
        assert not printer.closed.is_set()
        printer(Closed("u", 1.0, "finalized"))
        assert printer.closed.is_set()

    @pytest.mark.parametrize(
        ("text", "columns", "shown"),
        [
            ("short", 10, "short"),
            ("exactly ten", 11, "exactly ten"),
            ("a longer text", 6, "… text"),
            ("你好世界", 8, "你好世界"),
            ("你好世界", 7, "…好世界"),
            ("你好世界", 6, "…世界"),
        ],
    )
    def test_a_partial_never_breaks_the_line(self, text, columns, shown):
        assert _last_columns(text, columns) == shown


class TestChunks:
    def test_a_recording_comes_when_it_would_be_spoken(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr("speechrnt.live.time.monotonic", lambda: now[0])
        monkeypatch.setattr(
            "speechrnt.live.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
        )
        audio = Audio(np.arange(4000, dtype=np.float32) / 4000)
        arrivals = [(now[0] - 100, len(chunk)) for chunk in recorded_chunks(audio, 2.0)]
        assert [size for _, size in arrivals] == [1600, 1600, 800]
        assert [at for at, _ in arrivals] == pytest.approx([0.05, 0.1, 0.125])

    def test_bytes_come_as_they_are_read(self):
        data = bytes(range(256)) * 40
        chunks = list(pcm_chunks(io.BytesIO(data), 16_000, "s16"))
        assert b"".join(chunks) == data
        assert max(map(len, chunks)) == 3200
