"""The generator of segments: when it lets go of what it holds."""

import gc
import threading
from collections.abc import Generator
from concurrent.futures import CancelledError

import pytest

from speechrnt.segments import Segments


def segments(released, texts=("a", "b"), error=None):
    def decode(progress):
        for number, text in enumerate(texts, 1):
            yield text
            progress(float(number))
        if error is not None:
            raise error

    return Segments(decode, 2.0, release=lambda: released.append(1))


def test_after_the_last_segment():
    released = []
    iterator = segments(released)
    assert [next(iterator), next(iterator), released] == ["a", "b", []]
    assert list(iterator) == []
    assert (released, iterator.seconds_done, iterator.duration) == ([1], 2.0, 2.0)
    iterator.close()
    assert released == [1]


@pytest.mark.parametrize("begun", [False, True])
def test_when_closed(begun):
    released = []
    iterator = segments(released)
    if begun:
        next(iterator)
    iterator.close()
    assert (released, list(iterator)) == ([1], [])


@pytest.mark.parametrize("begun", [False, True])
def test_with_the_last_reference_and_without_the_garbage_collector(begun):
    released = []
    iterator = segments(released)
    if begun:
        next(iterator)
    gc.disable()
    try:
        del iterator
        assert released == [1]
    finally:
        gc.enable()


@pytest.mark.parametrize("begun", [False, True])
def test_when_whoever_iterates_finds_it_cancelled(begun):
    released = []
    iterator = segments(released)
    if begun:
        next(iterator)
    thread = threading.Thread(target=iterator.cancel)
    thread.start()
    thread.join()
    assert released == []
    for _ in range(2):
        with pytest.raises(CancelledError):
            next(iterator)
    assert released == [1]


def test_when_decoding_fails():
    released = []
    iterator = segments(released, error=ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        list(iterator)
    assert released == [1]


def test_it_is_a_generator_to_those_who_ask():
    released = []
    iterator = segments(released)
    assert isinstance(iterator, Generator)
    assert [iterator.send(None), iterator.send(None)] == ["a", "b"]
    with pytest.raises(StopIteration):
        iterator.send(None)
    assert released == [1]


@pytest.mark.parametrize("exception", [LookupError, LookupError("thrown")])
def test_where_an_exception_is_thrown_into_it(exception):
    released = []
    iterator = segments(released)
    next(iterator)
    with pytest.raises(LookupError):
        iterator.throw(exception)
    assert (released, list(iterator)) == ([1], [])
