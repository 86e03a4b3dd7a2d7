import os

# Two CPU devices in the test process, so that sharding is tested everywhere. Must precede jax.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=2"
)

# On a GPU, this process and those that tests start share its memory: none may take it all.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax
import pytest

from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import split_works
from tests.common import TEXT, TINY, Workplace

# Under nohup the tests' processes would ignore what some of them are about.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The real texts; skips where they are not at hand."""
    folder = Path(os.environ.get("GOTHIC_MIRROR", ROOT.parent / "shared" / "corpus"))
    if not (folder / "wilde").is_dir():
        pytest.skip("the real texts are not here: set GOTHIC_MIRROR to a mirror of them")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(split_works(TEXT), TINY.vocab_size, 2)


@pytest.fixture
def workplace(tmp_path: Path, tokenizer: Tokenizer) -> Workplace:
    """A folder with texts and a tokenizer, in which a tiny run can be trained."""
    return Workplace.make(tmp_path, tokenizer)


def folder_of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This run's temporary folder, also in a worker process of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Workplace:
    """A finished run of six iterations; the first worker that needs it trains it."""
    folder = folder_of_all_workers(tmp_path_factory)
    root = folder / "trained"
    with filelock.FileLock(folder / "trained.lock"):
        if root.exists():
            return Workplace(root)
        root.mkdir()
        workplace = Workplace.make(root, tokenizer)
        assert workplace.train() == 0
        return workplace


@pytest.fixture
def trained(trained_once: Workplace, tmp_path: Path) -> Workplace:
    """A workplace of the test's own with a finished run of six iterations in it."""
    root = tmp_path / "trained"
    shutil.copytree(trained_once.root, root)
    return Workplace(root)


def pytest_configure(config: pytest.Config) -> None:
    """All but the GPU tests are about arithmetic that is the same everywhere: on the CPU."""
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many tests, and the commands they start, compile the same tiny programs."""
    settings = {
        "jax_compilation_cache_dir": str(folder_of_all_workers(tmp_path_factory) / "compiled"),
        "jax_compilation_cache_max_size": 2**32,  # with a limit, JAX locks the folder
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def release_compiled() -> Iterator[None]:
    """A module's compiled programs are of no use to the next one, and take hundreds of MB."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
