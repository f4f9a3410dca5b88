"""Texts packed into rows without padding, and the attention over them."""
