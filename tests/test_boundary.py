"""What goes wrong with one image is that image's error, and the memory of a process is held meanwhile."""

import errno
import resource
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import StorageError, UserError
from helpers.images.boundary import MAX_CHARACTERS, READ_ERRORS, UnreadableImageError, attempt
from helpers.memory import bounded, resident_megabytes

EXCEPTIONS = [ValueError, OverflowError, IndexError, KeyError, RecursionError, MemoryError, OSError, RuntimeError]
EXCEPTIONS += [UnicodeDecodeError, AssertionError, StopIteration, TypeError, UnreadableImageError]


def fail(error: BaseException) -> None:
    raise error


def made(kind: type[Exception], text: str) -> Exception:
    return kind("utf-8", b"x", 0, 1, text) if kind is UnicodeDecodeError else kind(text)


def test_what_works_is_handed_on():
    assert attempt(divmod, 7, 2) == ((3, 1), None)


@given(st.sampled_from(EXCEPTIONS), st.text())
def test_whatever_is_raised_becomes_one_line_that_is_not_empty_and_not_long(kind, text):
    result, error = attempt(fail, made(kind, text))
    assert result is None
    assert error and error.strip() == error and len(error) <= MAX_CHARACTERS
    assert len(error.splitlines()) == 1
    error.encode()  # as Arrow wants it


@pytest.mark.parametrize("text", ["list index out of range", "two\nlines", "x" * 10_000, "", "half a character \ud800"])
def test_an_error_that_nobody_foresaw_has_its_type_and_what_it_says(text):
    _, error = attempt(fail, IndexError(text))
    assert "IndexError" in error
    assert text[:20].split("\n")[0].rstrip("\ud800") in error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnreadableImageError("the file is empty"), "the file is empty"),
        (FileNotFoundError(errno.ENOENT, "No such file"), READ_ERRORS[errno.ENOENT]),
        (OSError(errno.EIO, "Input/output error"), "the file cannot be read: Input/output error"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_known_error_is_in_words(error, words):
    assert words in attempt(fail, error)[1]


@pytest.mark.parametrize("kind", [UserError, StorageError])
def test_what_a_user_must_mend_is_no_error_of_an_image(kind):
    with pytest.raises(kind, match="the credential was refused"):
        attempt(fail, kind("the credential was refused"))


def test_a_package_that_is_missing_is_no_error_of_an_image():
    with pytest.raises(ModuleNotFoundError, match="av"):
        attempt(fail, ModuleNotFoundError("No module named 'av'"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_what_ends_a_process_ends_it(error):
    with pytest.raises(type(error)):
        attempt(fail, error)


def test_a_signature_in_what_a_library_says_does_not_reach_the_row():
    _, error = attempt(fail, RuntimeError("GET https://host/a.png?sv=1&sig=SECRET%2Bsignature failed"))
    assert "SECRET" not in error and "RuntimeError" in error


# ---------------------------------------------------------------- memory


def test_memory_beyond_the_limit_is_an_error_and_within_it_is_not():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded(round(resident_megabytes()) + 200) as left:
        assert 190 * 2**20 < left < 210 * 2**20
        assert np.ones(100 * 2**20, np.uint8).all()
        with pytest.raises(MemoryError):
            np.ones(300 * 2**20, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert np.ones(300 * 2**20, np.uint8).all()


def test_the_limit_ends_with_its_block_whatever_happens_in_it():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="damaged"), bounded(round(resident_megabytes()) + 50):
        raise ValueError("damaged")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_process_without_a_limit_gets_none():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded(None) as left:
        assert left is None and resource.getrlimit(resource.RLIMIT_AS) == before


def test_what_is_taken_already_leaves_nothing_and_is_no_error():
    with bounded(1) as left:
        assert left == 0


def test_a_limit_that_was_there_is_not_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with bounded(round(resident_megabytes()) + 100):
        held = resource.getrlimit(resource.RLIMIT_AS)[0]
        with bounded(10**6):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == held
    assert resource.getrlimit(resource.RLIMIT_AS) == (soft, hard)


def test_threads_that_run_meanwhile_go_on():
    done = threading.Event()
    thread = threading.Thread(target=lambda: (sum(range(10**6)), done.set()))
    with bounded(round(resident_megabytes()) + 200):
        thread.start()
        assert done.wait(60)
    thread.join()
