def pytest_collection_modifyitems(items):
    """The longest ones first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: "test_triton.py" not in item.nodeid)
