"""Where tests run and how many: --full, the devices of this machine, outputs filled with NaN."""

import pytest
import torch

NO_CUDA = "no CUDA device on this machine"


def pytest_addoption(parser):
    add = parser.addoption
    add("--full", action="store_true", help="all cases, also without a GPU")
    add("--random-problems", type=int, default=64, help="how many, emulated and on a GPU")
    add("--first-problem", type=int, default=0, help="the first one's seed")


def pytest_generate_tests(metafunc):
    """The random problems asked for, by number: on the emulation and on a GPU."""
    if metafunc.function.__name__ == "test_random_problem":
        first, count = (metafunc.config.getoption(o) for o in ("first_problem", "random_problems"))
        metafunc.parametrize("number", range(first, first + count))


@pytest.fixture(scope="session")
def ops():
    """The registered operators, with their fakes."""
    import mamba2_cuda.ops  # noqa: F401

    return torch.ops.mamba2_cuda


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return request.param


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return "cuda"


@pytest.fixture
def nan_filled():
    """Memory that an operator allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
