"""undo_ray: iterative distillation (UNDO, arXiv 2504.02521) as a Ray application."""

__version__ = "0.1.0"
