"""Cold-start data and rejection sampling: filters, near-duplicates, choice, rewriting, review (DeepSeek-R1, section 2.3)."""
