"""What a step needs, computed from its shapes: bytes of memory and bytes moved."""
