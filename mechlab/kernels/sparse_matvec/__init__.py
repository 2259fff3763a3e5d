"""Product of a sparse vector with a matrix: rows of inputs that are off are not read (arXiv 2505.19427, 2408.14690)."""

from mechlab.kernels.dispatch import Choice
from mechlab.kernels.sparse_matvec.api import as_slabs, choose, sparse_matvec

__all__ = ["Choice", "as_slabs", "choose", "sparse_matvec"]
