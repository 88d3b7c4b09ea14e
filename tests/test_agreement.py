"""LocalAgreement: what two transcripts of a growing window settle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechrnt.agreement import LocalAgreement, join_words, split_words

words = st.lists(st.sampled_from("one two three four".split()), max_size=6)


def follow(*texts, step_s=1.0):
    """Show texts to an agreement; return it, and what each of them committed."""
    agreement = LocalAgreement()
    return agreement, [
        agreement.update(text.split(), number * step_s) for number, text in enumerate(texts)
    ]


class TestLocalAgreement:
    def test_one_transcript_commits_nothing(self):
        agreement, new = follow("what is the weather")
        assert new == [[]]
        assert agreement.unstable == ["what", "is", "the"]

    def test_two_commit_what_they_begin_with_alike(self):
        agreement, new = follow("what is a feather in", "what is the weather in Rome")
        assert new[1] == agreement.committed == ["what", "is"]
        assert agreement.unstable == ["the", "weather", "in"]

    def test_the_last_word_waits_as_the_audio_may_end_within_it(self):
        agreement, new = follow("start the", "start the")
        assert new[1] == ["start"]
        assert agreement.unstable == []

    def test_what_is_committed_comes_once(self):
        _, new = follow("a b c", "a b c d", "a b c d e")
        assert new == [[], ["a", "b"], ["c"]]

    def test_a_transcript_that_begins_otherwise_commits_nothing(self):
        agreement, new = follow("a b c d", "a b c d", "x b c d e f", "x b c d e f")
        assert new[2:] == [[], []]
        assert agreement.committed == ["a", "b", "c"]

    def test_a_shorter_transcript_takes_nothing_back(self):
        agreement, new = follow("a b c d", "a b c d", "a b", "a b c d e f")
        assert new[2:] == [[], []]  # the one before had no more than "a"
        assert agreement.committed == ["a", "b", "c"]
        assert agreement.update("a b c d e f".split(), 9.0) == ["d", "e"]

    def test_an_agreement_must_last(self):
        # The model completes alike what it has not heard yet.
        agreement, new = follow(
            "my birthday is on May first",
            "my birthday is on May first",
            "my birthday is on April first",
            "my birthday is on April first",
            step_s=0.5,
        )
        assert new == [[], [], ["my", "birthday", "is", "on"], []]
        assert agreement.update("my birthday is on April first".split(), 2.0) == ["April"]

    def test_it_does_not_matter_how_many_agree_meanwhile(self):
        _, new = follow(*["a b c"] * 12, step_s=0.125)
        assert [bool(words) for words in new] == [False] * 6 + [True] + [False] * 5

    def test_nothing_said_commits_nothing(self):
        agreement, new = follow("", "", "a")
        assert new == [[], [], []]
        assert (agreement.committed, agreement.unstable) == ([], [])

    @pytest.mark.parametrize(
        ("final", "contradicted"),
        [("a b c d", 0), ("a b c", 0), ("a b x", 1), ("a", 2), ("x b c", 3), ("", 3)],
    )
    def test_words_that_a_final_contradicts_are_counted(self, final, contradicted):
        agreement, _ = follow("a b c d", "a b c d")
        assert agreement.contradicted_by(final.split()) == contradicted

    @given(st.lists(words, max_size=8))
    def test_committed_text_only_grows_and_was_said_twice(self, transcripts):
        agreement = LocalAgreement()
        committed = []
        for number, transcript in enumerate(transcripts):
            before = transcripts[number - 1] if number else []
            new = agreement.update(transcript, float(number))
            committed += new
            assert agreement.committed == committed
            if new:
                assert before[: len(committed)] == committed == transcript[: len(committed)]


class TestWords:
    def test_words_are_what_spaces_separate(self):
        assert split_words("  Öffne  das Fenster.", "de") == ["Öffne", "das", "Fenster."]
        assert join_words(["Öffne", "das"], "de") == "Öffne das"

    def test_characters_where_there_are_no_spaces(self):
        assert split_words("你好 世界", "zh") == list("你好世界")
        assert join_words(["你", "好"], "ja") == "你好"
