"""The Ray cluster: which one is joined, whether it answers and sees the folders, what fits on its nodes, what is waited
for.
"""
