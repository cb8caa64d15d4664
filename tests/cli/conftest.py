"""Pictures and a finished run, made once."""

import pytest
from cli_helpers import SMALL, write_pairs

from vlmfast.cli import main


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_pairs(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(pairs_folder, tmp_path_factory):
    """A finished two-epoch run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "clip", "--data", str(pairs_folder), "--out", str(out), *SMALL]) == 0
    return out
