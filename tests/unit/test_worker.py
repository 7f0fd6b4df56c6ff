"""Work in a process of its own: its answer, its errors and its end come back."""

import os
import signal

import pytest

from edgedistill.errors import BundleError, CheckFailedError, ConfigError
from export import budget
from export.stages import about, stage, told_to
from export.worker import in_child, works_alone


def fail(message):
    raise CheckFailedError(message)


def announce(depth):
    stage(f"depth {depth}")
    return in_child(announce, depth - 1)[0] if depth else os.getpid()


def vanish():
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_answer_comes_back_with_what_it_took():
    answer, used = in_child(divmod, 17, 5)
    assert answer == (3, 2)
    assert 0.005 < used.peak_gb < 4


def test_what_the_parent_takes_is_not_counted():
    weight = b"x" * 1_200_000_000
    _, used = in_child(divmod, len(weight), 5)
    assert used.peak_gb < 1


def test_our_errors_come_back_as_they_are():
    with pytest.raises(CheckFailedError, match=r"^12 dB$"):
        in_child(fail, "12 dB")


def test_a_killed_process_is_one_clear_error():
    with pytest.raises(
        BundleError,
        match="^onnx-float32, unet: the process .* was killed, most likely .*--max-memory",
    ):
        in_child(vanish, what="onnx-float32, unet")


def test_stages_are_told_from_the_childs_child_too():
    heard = []
    with told_to(heard.append):
        with about("unet"):
            assert in_child(announce, 1)[0] != os.getpid()
        stage("here")
    with about("nobody"):
        stage("to nobody")
    assert heard == ["unet: depth 1", "unet: depth 0", "here"]


@pytest.mark.parametrize(
    ("isolate", "size", "alone"),
    [("auto", 10**6, False), ("auto", 10**9, True), ("always", 1, True), ("never", 10**12, False)],
)
def test_large_networks_get_a_process(isolate, size, alone):
    assert works_alone(isolate, size) is alone


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5g", 1.5 * 10**9), ("2GiB", 2 * 2**30), ("512", 512)]
)
def test_amounts_of_memory_are_read(text, size):
    assert budget.size_of(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "0", "8 GBs"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ConfigError, match="is no amount of memory; write it like 8GB"):
        budget.size_of(text)
