"""What all tests share: one seed for the whole run, printed and replayable, and how hard hypothesis tries."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
STARTS_THE_SERVICE = (TESTS / "e2e", TESTS / "cluster" / "test_service.py")

settings.register_profile(
    "ci", max_examples=50, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=2_000)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="replay a run: the seed that it printed (default: a new one)")
    parser.addoption("--runs", type=int, help="how many runs of the simulation (default: some hundreds)")
    parser.addoption("--first-seed", type=int, help="seed of the simulation's first run; the others follow it")
    parser.addoption(
        "--kills", type=int, help="how many kills of the service's processes (default: a few of each kind)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draws the seed before hypothesis asks for it; a worker of pytest-xdist gets it with its controller's options."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that starts this in the background makes it ignore SIGINT, and so would all that tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return _seed_line(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_seed_line(config))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps together what shares a service: all that use the same one of tests/e2e, and otherwise the tests of a file.

    So as many services run at a time as there are workers, and no worker is idle while another has all the services
    before it.
    """
    if any(item.path.is_relative_to(path) for path in STARTS_THE_SERVICE):
        shares = item.path.parent.name == "e2e" and "service" in getattr(item, "fixturenames", ())
        store = item.callspec.params.get("service", "local") if hasattr(item, "callspec") else "local"
        item.add_marker(pytest.mark.xdist_group(f"service, {store}" if shares else item.path.stem))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed: what a test draws, it draws from a generator seeded with it."""
    drawn: int = request.config.option.seed
    return drawn


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line at once, past the capture: for tests that run long when they are told to."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    return tell


def _seed_line(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (the same again: pytest --seed {config.option.seed})"
