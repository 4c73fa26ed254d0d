"""The solvers that made our data: Navier-Stokes on the torus, potential flow about Joukowski airfoils, a buoyant
plume."""

from isotone.transform_once.solvers.joukowski import Joukowski, joukowski
from isotone.transform_once.solvers.navier_stokes import gaussian_field, navier_stokes, solve_vorticity
from isotone.transform_once.solvers.plume import plume

__all__ = ["Joukowski", "gaussian_field", "joukowski", "navier_stokes", "plume", "solve_vorticity"]
