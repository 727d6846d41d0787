"""Of tests/image: the image and what docker/compose.yaml starts from it."""
