"""Order of the tests, and what importing them must not cost."""

import gc

gc.disable()  # while the tests are imported: nearly all that comes stays, and is gone through again and again


def pytest_collection_modifyitems(items):
    """The longest ones first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: "test_triton.py" not in item.nodeid)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries report as leaks what is still there in the end
