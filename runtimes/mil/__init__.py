"""A reference evaluator of saved Core ML programs: every op in PyTorch, at the precision the file declares."""

from .program import MilProgram

__all__ = ["MilProgram"]
