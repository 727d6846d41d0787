"""How far two cores agree, and how far they would agree by chance."""
