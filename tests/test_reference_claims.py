"""The table of the reference document's figures: README shows what the script says of them."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def claims():
    """The script, as a module."""
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import reference_claims
    finally:
        sys.path.remove(str(ROOT / "perf"))
    return reference_claims


@pytest.fixture(scope="module")
def table(claims):
    """The lines of README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(claims.BEGIN) == 1
    block = text.partition(claims.BEGIN)[2].partition(claims.END)[0]
    return block.strip().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_has_a_row_for_each_claim_and_no_other(claims, table):
    assert table[:2] == claims.head()
    rows = [cells(line) for line in table[2:] if line.startswith("|")]
    assert [row[:4] for row in rows] == [
        [claim.title, claim.claim, claim.baseline, name] for name, claim in claims.CLAIMS.items()
    ]


def test_the_readme_says_where_its_figures_come_from(claims, table):
    pattern = r".+, \d+ cores, Python [\d.]+, NumPy [\d.]+; medians of \d+ rounds\."
    assert re.fullmatch(pattern, table[-1])
    assert re.fullmatch(pattern, claims.machine(3))
    assert claims.machine(1).endswith("; one round.")


def test_met_is_what_the_figures_say(claims, table):
    for line in table[2:]:
        if not line.startswith("|"):
            continue
        *_, name, figures, change, met = cells(line)
        claim = claims.CLAIMS[name]
        if figures == "needs a GPU":
            assert claim.needs_gpu
            assert (change, met) == ("", "")
            continue
        theirs, ours = map(float, re.findall(r"[\d.]+", figures)[:2])
        assert figures.startswith(f"{claims.rounded(theirs)} → {claims.rounded(ours)}")
        reduction = -float(change.replace("−", "-").removesuffix("%")) / 100
        # Of medians and of rounds: near each other.
        assert reduction == pytest.approx(1 - ours / theirs, abs=0.15)
        if claim.most is not None:
            assert met == ("yes" if ours <= claim.most * claim.scale else "no")
        elif abs(reduction - claim.met) > 0.005:
            assert met == ("yes" if reduction >= claim.met else "no")


def test_a_row(claims):
    assert claims.row("allocation", [(2e-6, 1e-6), (4e-6, 1e-6), (4e-6, 3e-6)]) == (
        "| audio buffer of 30 s, take and write | −50 to −80 % | `np.empty` | allocation "
        "| 4 → 1 µs | −50 % | yes |"
    )
    # Of the GPU's utilisation the document says how much it is, not by how much it is better.
    assert claims.row("gpu-utilisation", [(0.7, 0.3)]).endswith("| 70 → 30 % | −57 % | no |")
    assert claims.row("gpu-utilisation", [(0.2, 0.19)]).endswith("| 20 → 19 % | −5 % | yes |")
    assert claims.row("gpu-allocation", []).endswith("| gpu-allocation | needs a GPU |  |  |")


def test_more_of_what_was_nothing_is_no_gain(claims):
    # The claim gives no figure, so that no change would meet it.
    assert claims.row("spread", [(0.0, 0.0)]).endswith("| 0 → 0 % | 0 % | yes |")
    assert claims.row("spread", [(0.0, 0.1)]).endswith("| 0 → 10 % | from 0 | no |")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (-1.0, "−100 %"),
        (-0.996, "−99.6 %"),
        (-0.99967, "−99.97 %"),
        (-0.9998, "−99.98 %"),
        (-0.994, "−99 %"),
        (-0.001, "0 %"),
        (-0.0, "0 %"),
        (0.34, "+34 %"),
        (1.0, "+100 %"),
        (12.5, "+1250 %"),
    ],
)
def test_changes_are_all_of_it_only_where_nothing_is_left(claims, change, text):
    assert claims.percent(change) == text


def test_no_rounds_are_refused(claims, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reference_claims.py", "--rounds", "0", "--only", "locks"])
    with pytest.raises(SystemExit):
        claims.compare()
    assert "--rounds 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(1174.6, "1170"), (2e3, "2000"), (99.96, "100"), (0.0474, "0.0474"), (4e-6, "0.000004")],
)
def test_numbers_have_three_digits_and_no_exponent(claims, value, text):
    assert claims.rounded(value) == text


def test_only_what_is_between_the_marks_is_replaced(claims):
    text = f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n{claims.END}\n"
    done = claims.put(text, r"new \1")
    assert done == f"before\n{claims.BEGIN}\nnew \\1\n{claims.END}\nafter\n{claims.END}\n"
    with pytest.raises(ValueError, match="there must be one"):
        claims.put("no marks", "new")


def test_what_is_compared_can_be_measured(claims):
    # The quick ones; the others run for seconds.
    assert claims.locks(True) < claims.locks(False)
    assert claims.locks(False) >= 2
    assert claims.pooled(claims.clean_up) > 0
