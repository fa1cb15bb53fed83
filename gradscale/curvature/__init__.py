"""Curvature without its matrix: operators, Krylov methods and traces on vectors cut into slices."""
