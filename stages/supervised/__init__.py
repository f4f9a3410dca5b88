"""Supervised training: the toy's base model, the cold start, distillation."""
