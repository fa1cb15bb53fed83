"""Hessian, Gauss-Newton and gradient covariance as symmetric maps of R^P, and what is computed from their products."""
