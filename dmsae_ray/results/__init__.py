"""What is made of a sweep's chains when they are done: evaluation, features, expectations."""
