"""What is made of a sweep's chains when they are done, a file for each artifact: evaluation, comparison, consensus,
features, numbers, expectations.
"""
