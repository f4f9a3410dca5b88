"""Rule rewards of R1-Zero and R1: accuracy, format, language consistency (DeepSeek-R1, sections 2.2 and 3.2)."""
