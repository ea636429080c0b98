"""Distillation losses: what a student is told to imitate of its frozen teacher, one file each.

All take the teacher first and average over real tokens only.
"""
