"""Every purpose of a random draw. Each is part of the seed of its generator, so that no draw depends on another, nor on
how many there are.

Stored data, cores and comparisons depend on these numbers: none is ever changed or given away again.
"""

# Order of data, from the data seed and the cycle.
UNITS = 101
ROWS = 102
# Datasets, from harvest.seed.
SEQUENCES = 201
SHARD_ROWS = 202
# Chains, from the chain's seed and the number of the cycle.
INIT = 301
SELECTION = 302
SLOT = 303
PREFIXES = 304
# Comparisons, from compare.seed; they are alone there, so that their numbers may be small.
COVARIANCE_NULL = 0
DENSITY_NULL = 1
DICTIONARY_NULL = 2
# 3 was the resampling of seeds, which is no more.
MMCS_NULL = 4
REDISCOVERY_NULL = 5
SUBSPACE_NULL = 7
PERMUTED_NULL = 8
COURSE_NULL = 9
