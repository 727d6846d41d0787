"""A real cluster on one machine, see box.py. A package, so that its conftest.py is not taken for the shared one."""
