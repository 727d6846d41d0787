"""One language model behind one small class, and the tiny model that ships with the package."""
