import pytest
from ranks import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.end()
